//! `[address]`: whether this relay moves its relay addresses itself, and whether it waits for them.

use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::ConfigError;
use crate::dataplane::RelayIp;

/// The written form. Its defaults are a relay whose address is the machine's and moves nowhere.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WrittenAddress {
    /// Put the relay addresses on `interface` while this relay owns them, and take them off when it does not.
    pub manage: bool,
    /// Interface that carries them.
    pub interface: String,
    /// Prefix length of the IPv4 address, 1..=32; 32 if not given.
    pub prefix: Option<u8>,
    /// Prefix length of the IPv6 address, 1..=128; 128 if not given.
    pub prefix6: Option<u8>,
    /// Program that moves the address where a network will not (a cloud's API): `HOOK up|down ADDRESS INTERFACE`.
    pub hook: PathBuf,
    /// This relay is a standby: whoever else is configured with the address is preferred.
    pub standby: bool,
    /// Wait for the address while another relay owns it. `standby` and `manage` imply it.
    pub wait: bool,
}

/// The checked form.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct AddressSettings {
    /// Addresses this relay puts on its interface, with their prefix lengths; none where it does not manage them.
    pub managed: Vec<(IpAddr, u8)>,
    /// Interface of the relay addresses: where they are raised, and where conflicts are looked for.
    pub interface: Option<String>,
    /// Program that is told too.
    pub hook: Option<PathBuf>,
    /// It is a standby.
    pub standby: bool,
    /// It waits for its address.
    pub waits: bool,
}

/// Longest name of an interface (IFNAMSIZ with its zero).
const MAX_INTERFACE: usize = 15;

impl WrittenAddress {
    /// The hook may stand beside the file.
    pub(super) fn start_at(&mut self, directory: &Path) {
        if !self.hook.as_os_str().is_empty() {
            self.hook = directory.join(&self.hook);
        }
    }

    /// Checks what can be checked without touching the machine. `named` says that `relay_ip` or `relay_ip6` was written
    /// and not found, `clustered` that there are controllers.
    pub(super) fn check(
        self,
        relay_ips: &[RelayIp],
        named: bool,
        clustered: bool,
    ) -> Result<AddressSettings, ConfigError> {
        let wrong = |key: &str, problem: String| ConfigError::new(format!("address.{key}"), problem);
        let waits = self.wait || self.standby || self.manage;
        let asked = if self.standby {
            "standby"
        } else if self.manage {
            "manage"
        } else {
            "wait"
        };
        if waits && !clustered {
            let problem = "needs controllers: they say who owns an address; name them, or leave this out";
            return Err(wrong(asked, problem.into()));
        }
        if waits && !named {
            let problem = "needs relay_ip (or relay_ip6): the address that moves is not found by itself; write it";
            return Err(wrong(asked, problem.into()));
        }
        let is_good = |c: char| !c.is_whitespace() && c != '/' && !c.is_control();
        if self.interface.len() > MAX_INTERFACE || !self.interface.chars().all(is_good) {
            let problem = format!("{:?} is no interface; write one that `ip link` shows", self.interface);
            return Err(wrong("interface", problem));
        }
        if self.interface.is_empty() && (self.manage || !self.hook.as_os_str().is_empty()) {
            let problem = "missing: name the interface that carries the relay address, for example eth0";
            return Err(wrong("interface", problem.into()));
        }
        if let Some(ip) = relay_ips.iter().find(|ip| self.manage && ip.bound.is_loopback()) {
            let problem = format!("the relay address {} is loopback, which cannot move", ip.bound);
            return Err(wrong("manage", problem));
        }
        for (key, written, most) in [("prefix", self.prefix, 32), ("prefix6", self.prefix6, 128)] {
            if let Some(length) = written.filter(|length| !(1..=most).contains(length)) {
                return Err(wrong(key, format!("{length} is not in 1..={most}")));
            }
            if written.is_some() && !self.manage {
                return Err(wrong(key, "is of no use without manage = true".into()));
            }
        }
        let prefix = |ip: IpAddr| if ip.is_ipv4() { self.prefix.unwrap_or(32) } else { self.prefix6.unwrap_or(128) };
        let managed = relay_ips.iter().filter(|_| self.manage).map(|ip| (ip.bound, prefix(ip.bound)));
        Ok(AddressSettings {
            managed: managed.collect(),
            interface: Some(self.interface).filter(|name| !name.is_empty()),
            hook: Some(self.hook).filter(|path| !path.as_os_str().is_empty()),
            standby: self.standby,
            waits,
        })
    }
}

impl AddressSettings {
    /// Checks it against this machine: interface, hook, capabilities.
    pub(super) fn check_machine(&self) -> Result<(), ConfigError> {
        if let Some(name) = &self.interface
            && let Err(error) = crate::sys::link::index_of(name)
        {
            let problem = format!("{name:?}: {error}; write one that `ip link` shows");
            return Err(ConfigError::new("address.interface", problem));
        }
        if let Some(hook) = &self.hook {
            let runs = std::fs::metadata(hook).map(|file| file.is_file() && file.permissions().mode() & 0o111 != 0);
            if !runs.unwrap_or(false) {
                let problem = format!("{} is no program that can be run", hook.display());
                return Err(ConfigError::new("address.hook", problem));
            }
        }
        let missing: Vec<_> = self.needed().into_iter().filter(|(bit, _)| !has_capability(*bit)).collect();
        if let Some((_, name)) = missing.first() {
            let key = if self.managed.is_empty() { "address.interface" } else { "address.manage" };
            let problem = format!(
                "this process lacks {name}, with which addresses are moved and conflicts seen; grant CAP_NET_ADMIN and \
                 CAP_NET_RAW (systemd: AmbientCapabilities=), or leave the key out"
            );
            return Err(ConfigError::new(key, problem));
        }
        Ok(())
    }

    fn needed(&self) -> Vec<(u32, &'static str)> {
        let mut needed = Vec::new();
        if !self.managed.is_empty() {
            needed.push((12, "CAP_NET_ADMIN"));
        }
        if self.interface.is_some() && self.waits {
            needed.push((13, "CAP_NET_RAW"));
        }
        needed
    }
}

/// Whether this process may use a capability now, by its number (linux/capability.h).
fn has_capability(bit: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    // A system that does not tell is not accused: the system call that needs it will say.
    effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).is_none_or(|set| set >> bit & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips() -> Vec<RelayIp> {
        ["198.51.100.7", "2001:db8::7"]
            .map(|text| text.parse().expect("literal"))
            .map(|ip: IpAddr| RelayIp { bound: ip, advertised: ip })
            .to_vec()
    }

    fn managed() -> WrittenAddress {
        WrittenAddress { manage: true, interface: "eth0".into(), ..WrittenAddress::default() }
    }

    #[test]
    fn what_moves_is_waited_for() {
        let checked = WrittenAddress::default().check(&ips(), false, false).expect("good");
        assert_eq!(checked, AddressSettings::default());
        let checked = managed().check(&ips(), true, true).expect("good");
        assert!(checked.waits && !checked.standby);
        assert_eq!(checked.managed, [(ips()[0].bound, 32), (ips()[1].bound, 128)]);
        let written = WrittenAddress { prefix: Some(24), prefix6: Some(64), ..managed() };
        let checked = written.check(&ips(), true, true).expect("good");
        assert_eq!(checked.managed.iter().map(|(_, length)| *length).collect::<Vec<_>>(), [24, 64]);
        let written = WrittenAddress { standby: true, ..WrittenAddress::default() };
        let checked = written.check(&ips(), true, true).expect("good");
        assert!(checked.waits && checked.standby && checked.managed.is_empty());
    }

    #[test]
    fn mistakes_name_their_key() {
        type Change = fn(&mut WrittenAddress);
        let cases: &[(Change, bool, bool, &str)] = &[
            (|_| {}, true, false, "address.manage: needs controllers"),
            (|w| w.standby = true, true, false, "address.standby: needs controllers"),
            (|_| {}, false, true, "address.manage: needs relay_ip"),
            (|w| w.interface.clear(), true, true, "address.interface: missing"),
            (|w| w.interface = "eth0/../x".into(), true, true, "address.interface: \"eth0/../x\" is no interface"),
            (|w| w.interface = "a-name-of-16-byt".into(), true, true, "address.interface: "),
            (|w| w.prefix = Some(33), true, true, "address.prefix: 33 is not in 1..=32"),
            (|w| w.prefix6 = Some(0), true, true, "address.prefix6: 0 is not in 1..=128"),
        ];
        for (change, named, clustered, expected) in cases {
            let mut written = managed();
            change(&mut written);
            let error = written.check(&ips(), *named, *clustered).expect_err(expected).to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        let written = WrittenAddress { wait: true, prefix: Some(24), ..WrittenAddress::default() };
        let error = written.check(&ips(), true, true).expect_err("of no use").to_string();
        assert!(error.starts_with("address.prefix: is of no use"), "{error}");
        let loopback = RelayIp { bound: [127, 0, 0, 1].into(), advertised: [127, 0, 0, 1].into() };
        let error = managed().check(&[loopback], true, true).expect_err("stays").to_string();
        assert!(error.starts_with("address.manage: the relay address 127.0.0.1 is loopback"), "{error}");
    }

    #[test]
    fn the_machine_is_asked() {
        let gone = AddressSettings { interface: Some("no-such-link".into()), ..AddressSettings::default() };
        let error = gone.check_machine().expect_err("no such interface").to_string();
        assert!(error.starts_with("address.interface: \"no-such-link\""), "{error}");
        let file = tempfile::NamedTempFile::new().expect("tempfile");
        for hook in [file.path(), Path::new("/")] {
            let hook = AddressSettings { hook: Some(hook.into()), ..AddressSettings::default() };
            let error = hook.check_machine().expect_err("no program").to_string();
            assert!(error.starts_with("address.hook: ") && error.ends_with("is no program that can be run"), "{error}");
        }
        AddressSettings { interface: Some("lo".into()), ..AddressSettings::default() }.check_machine().expect("good");
    }
}
