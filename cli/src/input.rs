//! What is to be an electron's input, as it is typed.

use std::{
    fs,
    io::{self, Read as _},
};

use anyhow::Context as _;
use atomizer::{ContentType, Payload};
use atomizer_programs::Mistyped;
use serde::de::IgnoredAny;

/// Reads an input: `-` is stdin, `@file` a file, anything else is it.
///
/// # Errors
/// [`Mistyped`] when there is no such file, or when it is to be JSON and is none.
pub(crate) fn read(typed: &str, content_type: Option<&str>) -> anyhow::Result<Payload> {
    let (name, bytes) = match (typed, typed.strip_prefix('@')) {
        ("-", _) => {
            let mut bytes = Vec::new();
            io::stdin().read_to_end(&mut bytes).context("failed to read stdin")?;
            ("stdin", bytes)
        }
        (_, Some(path)) => {
            (path, fs::read(path).map_err(|error| Mistyped(format!("{path}: {error}")))?)
        }
        _ => ("the input", typed.as_bytes().to_vec()),
    };
    match content_type.map(ContentType::from) {
        None | Some(ContentType::Json) => json(name, &bytes),
        Some(content_type) => Ok(Payload::new(content_type, bytes)),
    }
}

/// Checks that bytes are a JSON document, which is then sent as it was written.
///
/// # Errors
/// [`Mistyped`], with line and column.
pub(crate) fn json(name: &str, bytes: &[u8]) -> anyhow::Result<Payload> {
    serde_json::from_slice::<IgnoredAny>(bytes)
        .map_err(|error| Mistyped(format!("{name} is no JSON: {error}")))?;
    Ok(Payload::json(bytes.trim_ascii().to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_sent_as_it_was_written() {
        let written = "{\"a\": 1.000000000000000000000000000001}\n";
        assert_eq!(read(written, None).unwrap().body, written.trim());
        let error = read("{\"a\":\n oops}", None).unwrap_err();
        assert!(error.is::<Mistyped>());
        assert!(error.to_string().contains("the input is no JSON: "), "{error}");
        assert!(error.to_string().contains("at line 2 column 2"), "{error}");
        assert_eq!(read("oops", Some("text/plain")).unwrap().body, "oops");
        assert!(read("@/there/is/none", None).unwrap_err().is::<Mistyped>());
    }
}
