//! What the last controller said, checked, and how it is laid over this relay's own configuration (pure).

use std::collections::BTreeSet;
use std::net::IpAddr;

use prost::Message;
use turn_core::policy::Network;
use turn_core::{Features, Key, KeyRing, Limits, Policy, StaticUser, ThirdParty};
use turnpike_proto::v1;

use crate::config::{self, parse_network};

/// Why a controller's settings are refused, all of them: half of them would lock clients out.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum SettingsError {
    /// Not the message it should be.
    #[error("they cannot be decoded")]
    Damaged,
    /// RFC 8489 §14.9.
    #[error("the realm must have 1 to 127 characters")]
    Realm,
    /// Ids are one byte on the wire.
    #[error("a key is empty, or its id is above 255 or used twice")]
    Key,
    /// Without one no nonce can be made.
    #[error("there is no nonce key")]
    NoNonceKey,
    /// Not CIDR.
    #[error("a denied network is not written as address/prefix")]
    Network,
}

/// A controller's settings, checked.
#[derive(Clone, Debug)]
struct ClusterSettings {
    revision: u64,
    realm: String,
    rest_secrets: KeyRing,
    nonce_keys: KeyRing,
    record_keys: KeyRing,
    static_users: Vec<StaticUser>,
    denied: Vec<Network>,
    user_quota: usize,
}

/// What came of a settings message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Adopted {
    /// They are in force.
    New,
    /// They were already.
    Known,
    /// This relay has newer ones, of this revision.
    Older(u64),
}

/// Everything a controller shares with its relays.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cluster {
    settings: Option<ClusterSettings>,
    members: Vec<IpAddr>,
}

/// What this relay brings along itself.
#[derive(Clone, Debug)]
pub(crate) struct Local {
    pub(crate) realm: String,
    pub(crate) rest_secrets: KeyRing,
    pub(crate) static_users: Vec<StaticUser>,
    pub(crate) nonce_keys: KeyRing,
    pub(crate) denied: Vec<Network>,
    pub(crate) relay_ips: Vec<IpAddr>,
    pub(crate) allow_loopback: bool,
    pub(crate) user_quota: usize,
    pub(crate) limits: Limits,
    pub(crate) features: Features,
    pub(crate) third_party: Option<ThirdParty>,
}

impl Local {
    pub(crate) fn new(settings: &config::Settings, nonce_keys: KeyRing) -> Self {
        Self {
            realm: settings.realm.clone(),
            rest_secrets: settings.rest_secrets.clone(),
            static_users: settings.static_users.clone(),
            nonce_keys,
            denied: settings.denied_peers.clone(),
            relay_ips: settings.relay_ips.iter().map(|ip| ip.advertised).collect(),
            allow_loopback: settings.allow_loopback_peers,
            user_quota: settings.user_quota,
            limits: settings.limits.clone(),
            features: settings.features.clone(),
            third_party: settings.third_party.clone(),
        }
    }
}

impl Cluster {
    /// Takes settings over unless newer ones are known: replicas may lag behind one another.
    pub(crate) fn adopt_settings(&mut self, message: &v1::Settings) -> Result<Adopted, SettingsError> {
        let settings = check(message)?;
        match &self.settings {
            Some(known) if known.revision == settings.revision => return Ok(Adopted::Known),
            Some(known) if known.revision > settings.revision => return Ok(Adopted::Older(known.revision)),
            _ => {}
        }
        self.settings = Some(settings);
        Ok(Adopted::New)
    }

    /// Takes over settings that were kept on disk.
    pub(crate) fn adopt_kept_settings(&mut self, bytes: &[u8]) -> Result<Adopted, SettingsError> {
        self.adopt_settings(&v1::Settings::decode(bytes).map_err(|_| SettingsError::Damaged)?)
    }

    /// Takes the member list over; addresses that are none are left out. Returns whether it differs from the last one.
    pub(crate) fn adopt_members(&mut self, message: &v1::Members) -> bool {
        let ips = message.members.iter().flat_map(|member| &member.relay_ips);
        let members: BTreeSet<IpAddr> = ips.filter_map(|ip| ip.parse().ok()).collect();
        let members: Vec<_> = members.into_iter().collect();
        let differs = members != self.members;
        self.members = members;
        differs
    }

    /// Takes over a member list that was kept on disk.
    pub(crate) fn adopt_kept_members(&mut self, bytes: &[u8]) {
        if let Ok(message) = v1::Members::decode(bytes) {
            self.adopt_members(&message);
        }
    }

    /// Keys of the seal on stored records.
    pub(crate) fn record_keys(&self) -> KeyRing {
        self.settings.as_ref().map(|s| s.record_keys.clone()).unwrap_or_default()
    }

    /// Allocations one user may hold on this relay, 0 for no limit: its own number, else the cluster's.
    pub(crate) fn user_quota(&self, local: &Local) -> usize {
        match local.user_quota {
            0 => self.settings.as_ref().map_or(0, |s| s.user_quota),
            own => own,
        }
    }

    /// Whether clients can be authenticated.
    pub(crate) fn has_credentials(&self, local: &Local) -> bool {
        let own = !local.rest_secrets.0.is_empty() || !local.static_users.is_empty() || local.third_party.is_some();
        self.settings.is_some() || own
    }

    /// The settings workers run with: the cluster's keys where a controller was ever heard, else this relay's own.
    /// Policy is the sum of both. Without credentials there is no nonce key: such a relay answers Binding only.
    pub(crate) fn turn_settings(&self, local: &Local) -> turn_core::Settings {
        let members: BTreeSet<IpAddr> = self.members.iter().chain(&local.relay_ips).copied().collect();
        let mut policy = Policy {
            denied: local.denied.clone(),
            members: members.into_iter().collect(),
            allow_loopback: local.allow_loopback,
        };
        let (limits, features, third_party) = (local.limits.clone(), local.features.clone(), local.third_party.clone());
        match &self.settings {
            Some(cluster) => {
                policy.denied.extend_from_slice(&cluster.denied);
                turn_core::Settings {
                    realm: cluster.realm.clone(),
                    rest_secrets: cluster.rest_secrets.clone(),
                    nonce_keys: cluster.nonce_keys.clone(),
                    static_users: cluster.static_users.clone(),
                    policy,
                    limits,
                    features,
                    third_party,
                    draining: false,
                }
            }
            None => turn_core::Settings {
                realm: local.realm.clone(),
                rest_secrets: local.rest_secrets.clone(),
                nonce_keys: if self.has_credentials(local) { local.nonce_keys.clone() } else { KeyRing::default() },
                static_users: local.static_users.clone(),
                policy,
                limits,
                features,
                third_party,
                draining: false,
            },
        }
    }
}

fn check(message: &v1::Settings) -> Result<ClusterSettings, SettingsError> {
    if message.realm.is_empty() || message.realm.chars().count() > 127 {
        return Err(SettingsError::Realm);
    }
    if message.nonce_keys.is_empty() {
        return Err(SettingsError::NoNonceKey);
    }
    let denied = message.denied_peers.iter().map(|text| parse_network(text));
    let static_user =
        |user: &v1::StaticUser| StaticUser { username: user.username.clone(), password: user.password.clone() };
    Ok(ClusterSettings {
        revision: message.revision,
        realm: message.realm.clone(),
        rest_secrets: ring(&message.rest_secrets)?,
        nonce_keys: ring(&message.nonce_keys)?,
        record_keys: ring(&message.record_keys)?,
        static_users: message.static_users.iter().map(static_user).collect(),
        denied: denied.collect::<Option<_>>().ok_or(SettingsError::Network)?,
        user_quota: message.user_quota as usize,
    })
}

fn ring(secrets: &[v1::Secret]) -> Result<KeyRing, SettingsError> {
    let mut ring = KeyRing::default();
    for secret in secrets {
        let id = u8::try_from(secret.id).map_err(|_| SettingsError::Key)?;
        if secret.value.is_empty() || ring.find(id).is_some() {
            return Err(SettingsError::Key);
        }
        ring.0.push(Key { id, secret: secret.value.clone() });
    }
    Ok(ring)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(id: u32, value: &str) -> v1::Secret {
        v1::Secret { id, value: value.into() }
    }

    fn message() -> v1::Settings {
        v1::Settings {
            revision: 5,
            realm: "cluster".into(),
            rest_secrets: vec![secret(0, "s")],
            nonce_keys: vec![secret(1, "n")],
            record_keys: vec![secret(2, "r")],
            denied_peers: vec!["10.96.0.0/12".into()],
            user_quota: 3,
            static_users: Vec::new(),
        }
    }

    fn local(rest_secrets: &[&str]) -> Local {
        let keys = rest_secrets
            .iter()
            .enumerate()
            .map(|(index, text)| Key { id: u8::try_from(index).expect("few"), secret: text.as_bytes().to_vec() });
        Local {
            realm: "own".into(),
            rest_secrets: KeyRing(keys.collect()),
            static_users: Vec::new(),
            nonce_keys: KeyRing(vec![Key { id: 0, secret: vec![1; 32] }]),
            denied: vec![parse_network("192.168.0.0/16").expect("literal")],
            relay_ips: vec!["198.51.100.7".parse().expect("literal")],
            allow_loopback: true,
            user_quota: 0,
            limits: Limits::default(),
            features: Features::default(),
            third_party: None,
        }
    }

    #[test]
    fn the_cluster_wins_over_own_keys_and_policies_add_up() {
        let mut cluster = Cluster::default();
        let local = local(&["own"]);
        assert_eq!(cluster.turn_settings(&local).realm, "own");
        assert_eq!(cluster.adopt_settings(&message()), Ok(Adopted::New));
        cluster.adopt_members(&v1::Members {
            revision: 1,
            members: vec![v1::Member {
                relay_ips: vec!["203.0.113.9".into(), "nonsense".into()],
                ..Default::default()
            }],
        });
        let settings = cluster.turn_settings(&local);
        assert_eq!(settings.realm, "cluster");
        assert_eq!(settings.rest_secrets.0[0].secret, b"s");
        assert_eq!(settings.nonce_keys.0[0].id, 1);
        assert_eq!(settings.policy.denied.len(), 2);
        assert_eq!(settings.policy.members.len(), 2);
        assert!(settings.policy.allow_loopback);
        assert_eq!(cluster.record_keys().0[0].id, 2);
        assert_eq!(cluster.user_quota(&local), 3);
        assert_eq!(cluster.user_quota(&Local { user_quota: 1, ..local }), 1);
    }

    #[test]
    fn older_settings_do_not_come_back() {
        let mut cluster = Cluster::default();
        cluster.adopt_settings(&message()).expect("good");
        assert_eq!(cluster.adopt_settings(&message()), Ok(Adopted::Known));
        let older = v1::Settings { revision: 4, realm: "older".into(), ..message() };
        assert_eq!(cluster.adopt_settings(&older), Ok(Adopted::Older(5)));
        assert_eq!(cluster.turn_settings(&local(&[])).realm, "cluster");
    }

    #[test]
    fn settings_that_would_lock_clients_out_are_refused_whole() {
        type Spoil = fn(&mut v1::Settings);
        let cases: &[(Spoil, SettingsError)] = &[
            (|s| s.realm.clear(), SettingsError::Realm),
            (|s| s.realm = "x".repeat(128), SettingsError::Realm),
            (|s| s.nonce_keys.clear(), SettingsError::NoNonceKey),
            (|s| s.nonce_keys[0].id = 256, SettingsError::Key),
            (|s| s.rest_secrets[0].value.clear(), SettingsError::Key),
            (|s| s.record_keys.push(secret(2, "again")), SettingsError::Key),
            (|s| s.denied_peers.push("10.0.0.0".into()), SettingsError::Network),
        ];
        for (spoil, expected) in cases {
            let mut settings = message();
            spoil(&mut settings);
            let mut cluster = Cluster::default();
            assert_eq!(cluster.adopt_settings(&settings), Err(*expected));
            assert!(cluster.turn_settings(&local(&[])).nonce_keys.0.is_empty());
        }
        assert_eq!(Cluster::default().adopt_kept_settings(b"\xff"), Err(SettingsError::Damaged));
    }

    #[test]
    fn without_credentials_there_is_no_nonce_key() {
        let cluster = Cluster::default();
        assert!(!cluster.has_credentials(&local(&[])));
        assert!(cluster.turn_settings(&local(&[])).nonce_keys.0.is_empty());
        assert!(cluster.has_credentials(&local(&["own"])));
        assert_eq!(cluster.turn_settings(&local(&["own"])).nonce_keys.0.len(), 1);
    }

    #[test]
    fn what_is_kept_on_disk_is_taken_over() {
        let mut cluster = Cluster::default();
        assert_eq!(cluster.adopt_kept_settings(&message().encode_to_vec()), Ok(Adopted::New));
        assert_eq!(cluster.turn_settings(&local(&[])).realm, "cluster");
    }
}
