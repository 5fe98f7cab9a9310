//! What a broker says of itself before anything else, and whether it will do.

use std::fmt;

use lapin::types::{AMQPValue, FieldTable, parsing::parse_field_table};

/// The oldest RabbitMQ that will do, the first whose quorum queues know message TTL and safe dead-lettering.
const OLDEST: (u32, u32) = (3, 10);

/// A broker's product and version, and what it can do; what it does not tell is empty.
#[derive(Clone, Debug, Default)]
pub(crate) struct Server {
    product: String,
    version: String,
    capabilities: FieldTable,
}

impl Server {
    /// How long the greeting may be.
    pub(crate) const GREETING_BYTES_MAX: usize = 64 * 1024;

    /// Reads the first frame of a broker, `connection.start`. `None` as long as it is incomplete; nothing is
    /// known of a server whose first frame is another.
    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        // AMQP 0-9-1, 4.2.3: type, channel, size; then class, method, and two bytes of the protocol's version.
        let (head, rest) = bytes.split_first_chunk::<7>()?;
        let [kind, _, _, size @ ..] = *head;
        let size = usize::try_from(u32::from_be_bytes(size)).ok()?;
        if kind != 1 || size > Self::GREETING_BYTES_MAX {
            return Some(Self::default());
        }
        let Some(([0, 10, 0, 10, _, _], properties)) = rest.get(..size)?.split_first_chunk() else {
            return Some(Self::default());
        };
        Some(
            parse_field_table(properties)
                .map_or_else(|_| Self::default(), |(_, table)| Self::new(&table)),
        )
    }

    fn new(properties: &FieldTable) -> Self {
        let text = |name: &str| match properties.inner().get(name) {
            Some(AMQPValue::LongString(text)) => text.to_string(),
            _ => String::new(),
        };
        let capabilities = match properties.inner().get("capabilities") {
            Some(AMQPValue::FieldTable(table)) => table.clone(),
            _ => FieldTable::default(),
        };
        Self { product: text("product"), version: text("version"), capabilities }
    }

    /// Says why it will not do.
    pub(crate) fn check(&self) -> Result<(), String> {
        if let Some((major, minor)) = self.rabbitmq()
            && (major, minor) < OLDEST
        {
            let (oldest_major, oldest_minor) = OLDEST;
            return Err(format!(
                "{self} is too old: {oldest_major}.{oldest_minor} or later is needed"
            ));
        }
        for needed in ["publisher_confirms", "basic.nack"] {
            // Who says nothing of itself is taken as it is.
            if !self.capabilities.inner().is_empty()
                && self.capabilities.inner().get(needed) != Some(&AMQPValue::Boolean(true))
            {
                return Err(format!("{self} lacks {needed}"));
            }
        }
        Ok(())
    }

    /// Major and minor version, of a RabbitMQ.
    pub(crate) fn rabbitmq(&self) -> Option<(u32, u32)> {
        let mut parts = self.version.split(['.', '-', '+']).map(str::parse);
        match (self.product.as_str(), parts.next(), parts.next()) {
            ("RabbitMQ", Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
            _ => None,
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.product.as_str(), self.version.as_str()) {
            ("", "") => f.write_str("an unknown broker"),
            (product, version) => write!(f, "{product} {version}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(product: &str, version: &str, confirms: bool) -> Server {
        let mut capabilities = FieldTable::default();
        capabilities.insert("publisher_confirms".into(), confirms.into());
        capabilities.insert("basic.nack".into(), true.into());
        Server { product: product.to_owned(), version: version.to_owned(), capabilities }
    }

    #[test]
    fn a_broker_that_will_not_do_is_told_from_one_that_will() {
        for version in ["3.10.0", "3.10.0-rc.1", "3.13.7+1.g1", "4.0.5", "10.0", "soon", ""] {
            assert_eq!(server("RabbitMQ", version, true).check(), Ok(()), "{version}");
        }
        for version in ["3.9.29", "3.9", "2.8.7"] {
            let reason = server("RabbitMQ", version, true).check().unwrap_err();
            assert_eq!(reason, format!("RabbitMQ {version} is too old: 3.10 or later is needed"));
        }
        assert_eq!(server("Other", "0.1", true).check(), Ok(()));
        let reason = server("Other", "0.1", false).check().unwrap_err();
        assert_eq!(reason, "Other 0.1 lacks publisher_confirms");
        assert_eq!(Server::default().check(), Ok(()));
    }

    #[test]
    fn a_greeting_is_read_when_it_is_complete() {
        let table = b"\x07productS\x00\x00\x00\x08RabbitMQ\x07versionS\x00\x00\x00\x063.10.8";
        let mut frame = vec![0, 10, 0, 10, 0, 9, 0, 0, 0, 40];
        frame.extend_from_slice(table);
        frame.extend_from_slice(b"\x00\x00\x00\x05PLAIN\x00\x00\x00\x05en_US");
        let size = u8::try_from(frame.len()).unwrap();
        let mut bytes = vec![1, 0, 0, 0, 0, 0, size];
        bytes.extend(frame);
        for end in 0..bytes.len() {
            assert!(Server::read(&bytes[..end]).is_none(), "{end} bytes are not all");
        }
        assert_eq!(Server::read(&bytes).unwrap().to_string(), "RabbitMQ 3.10.8");
        assert_eq!(
            Server::read(b"HTTP/1.1 400 Bad Request").unwrap().to_string(),
            "an unknown broker"
        );
    }
}
