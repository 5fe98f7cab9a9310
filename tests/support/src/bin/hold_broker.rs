//! Starts a private broker, says where it is, and holds it until standard input ends.

use std::io::{Write as _, stdin, stdout};

use atomizer_test_support::{Broker, BrokerError};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let broker = Broker::start()?;
    let pid = broker.pid().ok_or_else(|| no_pid(&broker))?;
    let mut out = stdout().lock();
    writeln!(out, "{pid} {}", broker.describe())?;
    out.flush()?;
    std::io::copy(&mut stdin().lock(), &mut std::io::sink())?;
    Ok(())
}

fn no_pid(broker: &Broker) -> BrokerError {
    BrokerError::Unexpected { what: "a broker without a process", text: broker.log_tail(20) }
}
