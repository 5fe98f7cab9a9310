//! Reads what people type, and says what is wrong with it without repeating a password.

use std::{env, ffi::OsStr, fmt::Display, marker::PhantomData, process::ExitCode, str::FromStr};

use atomizer_rabbitmq::RabbitMq;
use clap::{
    Arg, Command, Parser,
    builder::TypedValueParser,
    error::{Error, ErrorKind},
};

use crate::program;

/// Parses the command line.
///
/// # Errors
/// The exit code, when everything is said: 2 when something was wrongly typed, 0 after `--help`.
pub fn parse<A: Parser>() -> Result<A, ExitCode> {
    A::try_parse().map_err(|error| {
        let text = without_passwords(&error.to_string(), env::args());
        if error.use_stderr() {
            eprint!("{text}");
            ExitCode::from(2)
        } else {
            // An error says that nobody reads it.
            drop(program::write(text.as_bytes()));
            ExitCode::SUCCESS
        }
    })
}

/// Takes arguments that may hold a password out of a text that quotes them.
fn without_passwords(text: &str, arguments: impl IntoIterator<Item = String>) -> String {
    let mut text = text.to_owned();
    for argument in arguments {
        let value = argument.split_once('=').map_or(argument.as_str(), |(_, value)| value);
        for quoted in [argument.as_str(), value] {
            if let Some((_, host)) = quoted.rsplit_once('@') {
                text = text.replace(quoted, &format!("***@{host}"));
            }
        }
    }
    text
}

/// Parses the URL of a broker; what is wrong with it is said without user and password.
#[derive(Clone, Copy, Debug)]
pub struct Url;

impl TypedValueParser for Url {
    type Value = RabbitMq;

    fn parse_ref(
        &self,
        command: &Command,
        argument: Option<&Arg>,
        value: &OsStr,
    ) -> Result<RabbitMq, Error> {
        let read = RabbitMq::from_url(&value.to_string_lossy());
        read.map_err(|error| refused(command, argument, error))
    }
}

/// Parses what may have a password in it; an error of it quotes nothing.
#[derive(Clone, Copy, Debug)]
pub struct Secret<T>(PhantomData<fn() -> T>);

impl<T> Secret<T> {
    /// Parses by [`FromStr`].
    #[must_use]
    pub const fn new() -> Self {
        Self(PhantomData)
    }
}

impl<T> Default for Secret<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> TypedValueParser for Secret<T>
where
    T: FromStr<Err: Display> + Clone + Send + Sync + 'static,
{
    type Value = T;

    fn parse_ref(
        &self,
        command: &Command,
        argument: Option<&Arg>,
        value: &OsStr,
    ) -> Result<T, Error> {
        value.to_string_lossy().parse().map_err(|error| refused(command, argument, error))
    }
}

/// Says what is wrong with an argument, without quoting it.
fn refused(command: &Command, argument: Option<&Arg>, reason: impl Display) -> Error {
    let argument = argument.map(|argument| format!(" for '{argument}'"));
    let message = format!("invalid value{}: {reason}", argument.unwrap_or_default());
    command.clone().error(ErrorKind::ValueValidation, message)
}

/// Parses a count of at least 1, as in `5000000`, `5_000_000`, `5e6` and `2.5e9`.
///
/// # Errors
/// A text that says what is wrong with it.
pub fn count(text: &str) -> Result<u64, String> {
    match whole_number(text)? {
        0 => Err("it must be at least 1".to_owned()),
        count => Ok(count),
    }
}

/// Parses a whole number of at least 0, in the same forms as [`count`].
///
/// # Errors
/// A text that says what is wrong with it.
pub fn whole_number(text: &str) -> Result<u64, String> {
    const EXPECTED: &str = "expected a whole number, such as 5000000, 5_000_000 or 5e6";
    let text = text.trim().replace('_', "").to_ascii_lowercase();
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    if let Some(positive) = mantissa.strip_prefix('-') {
        let is_number = positive.starts_with(|first: char| first.is_ascii_digit());
        return Err(if is_number { "it must not be negative" } else { EXPECTED }.to_owned());
    }
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let fraction = fraction.trim_end_matches('0');
    let digits = format!("{whole}{fraction}");
    let is_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let exponent = exponent.strip_prefix('+').unwrap_or(exponent);
    if whole.is_empty() || !is_digits(&digits) || exponent.is_empty() || !is_digits(exponent) {
        return Err(EXPECTED.to_owned());
    }
    let too_large = || format!("it must be at most {}", u64::MAX);
    let zeros = exponent.parse::<usize>().ok().filter(|&exponent| exponent <= 64);
    let Some(zeros) = zeros.ok_or_else(too_large)?.checked_sub(fraction.len()) else {
        return Err(EXPECTED.to_owned());
    };
    let digits = format!("{digits}{}", "0".repeat(zeros));
    digits.parse().map_err(|_| too_large())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_in_the_forms_people_type() {
        for (text, number) in [
            ("0", 0),
            ("1000000", 1_000_000),
            ("1_000_000", 1_000_000),
            ("1e9", 1_000_000_000),
            ("1E+9", 1_000_000_000),
            ("2.5e9", 2_500_000_000),
            ("1.0", 1),
            (" 42\r", 42),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(whole_number(text), Ok(number), "{text}");
        }
    }

    #[test]
    fn what_is_no_count_is_refused_with_a_reason() {
        for (text, reason) in [
            ("", "expected a whole number"),
            ("abc", "expected a whole number"),
            ("-", "expected a whole number"),
            ("--batch", "expected a whole number"),
            ("1e", "expected a whole number"),
            ("e9", "expected a whole number"),
            ("1e-3", "expected a whole number"),
            ("2.5", "expected a whole number"),
            ("2.55e1", "expected a whole number"),
            ("1 000", "expected a whole number"),
            ("NaN", "expected a whole number"),
            ("-5", "must not be negative"),
            ("-5e9", "must not be negative"),
            ("0", "at least 1"),
            ("0e9", "at least 1"),
            ("1e20", "at most 18446744073709551615"),
            ("1e99999999999999999999", "at most 18446744073709551615"),
            ("18446744073709551616", "at most 18446744073709551615"),
        ] {
            let error = count(text).expect_err(text);
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn an_argument_in_the_wrong_place_keeps_its_password() {
        let arguments = ["montecarlo", "amqp://alice:s3c@ret@host/", "--url=bob:hush@host"];
        let text =
            "unexpected 'amqp://alice:s3c@ret@host/' and '--url=bob:hush@host' or 'bob:hush@host'";
        let text = without_passwords(text, arguments.map(str::to_owned));
        assert_eq!(text, "unexpected '***@host/' and '***@host' or '***@host'");
    }
}
