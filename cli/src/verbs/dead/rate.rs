//! How fast, as it is typed.

use std::{num::NonZeroU32, str::FromStr, time::Duration};

/// So many in so long a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rate {
    pub(super) electrons: NonZeroU32,
    pub(super) per: Duration,
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "expected a number and a time, such as 100/s, 30/min or 5/h";
        let (number, unit) = text.split_once('/').unwrap_or((text, "s"));
        let per = match unit.trim() {
            "s" => 1,
            "m" | "min" => 60,
            "h" => 60 * 60,
            _ => return Err(EXPECTED.to_owned()),
        };
        let electrons = number.trim().parse().map_err(|_| EXPECTED.to_owned())?;
        let electrons = NonZeroU32::new(electrons).ok_or("it must be at least 1")?;
        Ok(Self { electrons, per: Duration::from_secs(per) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_as_people_type_them() {
        for (text, electrons, per) in
            [("100/s", 100, 1), ("100", 100, 1), ("30 / min", 30, 60), ("5/h", 5, 3600)]
        {
            let rate: Rate = text.parse().unwrap();
            assert_eq!((rate.electrons.get(), rate.per.as_secs()), (electrons, per), "{text}");
        }
        for text in ["", "0/s", "-1/s", "1/day", "fast", "1.5/s"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }
}
