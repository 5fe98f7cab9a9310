//! A small network on this machine, whose links can be taken down.
//!
//! A bridge with one address of ours, and beside it network namespaces, each at the end of a link
//! (a `veth` pair) with one address. Nothing leaves the machine, for nothing else is on the bridge.

use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use crate::error::BrokerError;
use crate::guard::{Guard, UNDO};
use crate::{ports, process};

/// How long one change may take.
const CHANGE_MAX: Duration = Duration::from_secs(10);

/// Networks to try before giving up, should others be in use.
const TRIES: usize = 16;

/// One place on the network.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) namespace: String,
    pub(crate) address: Ipv4Addr,
    /// Our end of it.
    interface: String,
}

/// A network; it vanishes when this value is dropped, or else with the guard.
#[derive(Debug)]
pub(crate) struct Network {
    links: Vec<Link>,
    guard: Arc<Guard>,
}

impl Network {
    /// Makes a network with so many places.
    pub(crate) fn make(guard: &Arc<Guard>, places: usize) -> Result<Self, BrokerError> {
        let subnet = free_subnet()?;
        let [a, b, c, _] = subnet.octets();
        // Unique on the machine; names of interfaces have 15 characters at the most.
        let name = format!("atm{:08x}", ports::random() & 0xffff_ffff);
        let links: Vec<Link> = (1..=places)
            .map(|number| Link {
                namespace: format!("{name}-{number}"),
                address: Ipv4Addr::new(a, b, c, 10 + u8::try_from(number).unwrap_or(u8::MAX)),
                interface: format!("{name}-{number}"),
            })
            .collect();
        // First of all how to be rid of it, should this process end in the middle.
        let mut undo: String =
            links.iter().map(|link| format!("ip netns del {}\n", link.namespace)).collect();
        undo.push_str(
            &links
                .iter()
                .map(|link| format!("ip link del {}\n", link.interface))
                .collect::<String>(),
        );
        undo.push_str(&format!("ip link del {name}\n"));
        fs::write(guard.folder().join(UNDO), undo)
            .map_err(BrokerError::io("noting how to remove the network"))?;
        let network = Self { links, guard: Arc::clone(guard) };
        ip(&format!("link add {name} type bridge"))?;
        ip(&format!("addr add {}/24 dev {name}", Ipv4Addr::new(a, b, c, 1)))?;
        ip(&format!("link set {name} up"))?;
        for Link { namespace, address, interface } in &network.links {
            ip(&format!("netns add {namespace}"))?;
            ip(&format!("link add {interface} type veth peer name eth0 netns {namespace}"))?;
            ip(&format!("link set {interface} master {name} up"))?;
            ip(&format!("-n {namespace} addr add {address}/24 dev eth0"))?;
            ip(&format!("-n {namespace} link set lo up"))?;
            ip(&format!("-n {namespace} link set eth0 up"))?;
        }
        Ok(network)
    }

    pub(crate) fn links(&self) -> &[Link] {
        &self.links
    }

    pub(crate) fn set_link(&self, place: usize, state: &str) -> Result<(), BrokerError> {
        ip(&format!("link set {} {state}", self.links[place].interface))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.guard.undo();
    }
}

/// Returns a network of 256 addresses that this machine does not use.
fn free_subnet() -> Result<Ipv4Addr, BrokerError> {
    for _ in 0..TRIES {
        let random = ports::random().to_be_bytes();
        let subnet = Ipv4Addr::new(198, 18 | (random[0] & 1), random[1], 0);
        let used = run("ip", &["-4", "route", "show", "root", &format!("{subnet}/24")])?;
        if used.trim().is_empty() {
            return Ok(subnet);
        }
    }
    Err(BrokerError::Network { what: "no addresses are free".to_owned() })
}

fn ip(arguments: &str) -> Result<(), BrokerError> {
    run("ip", &arguments.split(' ').collect::<Vec<_>>()).map(drop)
}

fn run(program: &str, arguments: &[&str]) -> Result<String, BrokerError> {
    let what = format!("{program} {}", arguments.join(" "));
    let output = process::output(Command::new(program).args(arguments), &what, CHANGE_MAX)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let why = String::from_utf8_lossy(&output.stderr);
    Err(BrokerError::Network { what: format!("`{what}` failed: {}", why.trim()) })
}
