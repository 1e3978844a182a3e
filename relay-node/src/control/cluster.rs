//! What the last controller said, checked, and how it is laid over this relay's own configuration (pure).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use prost::Message;
use turn_core::policy::Network;
use turn_core::{Features, Key, KeyRing, Limits, Policy, StaticUser, ThirdParty};
use turnpike_proto::v1;

use super::alternates::alternates;
use crate::config::{self, parse_network};

/// Longest life of a nonce.
const NONCE_LIFE: Duration = Duration::from_secs(3600);

/// How long secrets are accepted that were lost with a store: a credential lives a day unless controllers are told otherwise.
const CREDENTIAL_LIFE: Duration = Duration::from_secs(86_400);

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
    /// They are in force, and did not come from the ones before: the store is another one, or an older copy.
    Forked,
    /// They were already.
    Known,
    /// This relay has newer ones, of this revision.
    Older(u64),
}

/// Everything a controller shares with its relays.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cluster {
    settings: Option<ClusterSettings>,
    /// Nobody says which settings are the newest now.
    lags: bool,
    /// Nonce keys that this relay minted with until it heard that they are gone, and until when their nonces live.
    lingering: Vec<(Key, Instant)>,
    /// TURN REST secrets that were lost with a store, and until when they are accepted.
    orphaned: Vec<(Key, Instant)>,
    /// Relay IPs by node.
    members: BTreeMap<String, Vec<IpAddr>>,
    /// What that was read from.
    member_list: v1::Members,
    targets: Vec<v1::RedirectTarget>,
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
    pub(crate) cluster_only: bool,
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
            cluster_only: settings.cluster_only,
            user_quota: settings.user_quota,
            limits: settings.limits.clone(),
            features: settings.features.clone(),
            third_party: settings.third_party.clone(),
        }
    }
}

impl Cluster {
    /// Takes settings over unless newer ones are known: replicas may lag behind one another.
    ///
    /// A relay that was away while its newest nonce key came to its end has minted with it until now: it goes on
    /// accepting it for as long as those nonces live, because 438 to an Allocate ends the attempt of a browser.
    ///
    /// TURN REST secrets that are gone have been retired. Not so where the store was lost and these settings did not come
    /// from those that are known: calls whose credentials were made with them would end with their next Refresh.
    pub(crate) fn adopt_settings(&mut self, message: &v1::Settings, now: Instant) -> Result<Adopted, SettingsError> {
        let settings = check(message)?;
        match &self.settings {
            Some(known) if known.revision == settings.revision => return Ok(Adopted::Known),
            Some(known) if known.revision > settings.revision => return Ok(Adopted::Older(known.revision)),
            _ => {}
        }
        let minted = self.settings.as_ref().and_then(|known| known.nonce_keys.newest());
        if let Some(key) = minted.filter(|key| !settings.nonce_keys.0.contains(key)) {
            self.lingering.push((key.clone(), now + NONCE_LIFE));
        }
        self.lingering.retain(|(key, until)| *until > now && settings.nonce_keys.find(key.id).is_none());
        let forked = self.settings.as_ref().filter(|known| is_fork(known.revision, &message.lineage));
        let adopted = if forked.is_some() { Adopted::Forked } else { Adopted::New };
        let lost = forked.into_iter().flat_map(|known| known.rest_secrets.0.iter().cloned());
        self.orphaned.extend(lost.map(|key| (key, now + CREDENTIAL_LIFE)));
        let rest = &settings.rest_secrets.0;
        self.orphaned.retain(|(key, until)| *until > now && rest.iter().all(|live| live.secret != key.secret));
        self.settings = Some(settings);
        Ok(adopted)
    }

    /// A settings message as it is kept on disk: with what is accepted beside it, until the next message.
    pub(crate) fn kept(&self, message: &v1::Settings) -> v1::Settings {
        let mut kept = message.clone();
        for (key, _) in &self.orphaned {
            let free = (0..=u32::from(u8::MAX)).rev().find(|id| kept.rest_secrets.iter().all(|known| known.id != *id));
            kept.rest_secrets.extend(free.map(|id| v1::Secret { id, value: key.secret.clone() }));
        }
        kept
    }

    /// Takes over settings that were kept on disk.
    pub(crate) fn adopt_kept_settings(&mut self, bytes: &[u8]) -> Result<Adopted, SettingsError> {
        self.adopt_settings(&v1::Settings::decode(bytes).map_err(|_| SettingsError::Damaged)?, Instant::now())
    }

    /// Revision of the settings in force; 0 if there are none.
    pub(crate) fn revision(&self) -> u64 {
        self.settings.as_ref().map_or(0, |settings| settings.revision)
    }

    /// Whether other relays may have heard of newer settings: as long as there is no session. Returns whether that
    /// changes anything.
    pub(crate) fn lag(&mut self, lags: bool) -> bool {
        std::mem::replace(&mut self.lags, lags) != lags && self.settings.is_some()
    }

    /// Takes the member list over; addresses that are none are left out. Returns whether it differs from the last one.
    pub(crate) fn adopt_members(&mut self, message: &v1::Members) -> bool {
        let mut members: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        for member in &message.members {
            let ips = member.relay_ips.iter().filter_map(|ip| ip.parse::<IpAddr>().ok());
            members.entry(member.node_id.clone()).or_default().extend(ips);
        }
        self.members = members;
        // Its revision goes by the clock of whoever says it.
        let list = v1::Members { revision: 0, ..message.clone() };
        let differs = list != self.member_list;
        self.member_list = list;
        differs
    }

    /// Takes over where new clients may be sent. Returns whether that differs from before.
    pub(crate) fn adopt_redirects(&mut self, message: v1::Redirects) -> bool {
        let differs = message.targets != self.targets;
        self.targets = message.targets;
        differs
    }

    fn nonce_keys(&self, cluster: &ClusterSettings) -> KeyRing {
        let lingering = self.lingering.iter().map(|(key, _)| key);
        KeyRing(cluster.nonce_keys.0.iter().chain(lingering).cloned().collect())
    }

    fn rest_secrets(&self, cluster: &ClusterSettings) -> KeyRing {
        let orphaned = self.orphaned.iter().map(|(key, _)| key);
        KeyRing(cluster.rest_secrets.0.iter().chain(orphaned).cloned().collect())
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
        let members: BTreeSet<IpAddr> = self.members.values().flatten().chain(&local.relay_ips).copied().collect();
        let alternates = alternates(&self.targets, &self.members, &local.relay_ips);
        let mut policy = Policy {
            denied: local.denied.clone(),
            members: members.into_iter().collect(),
            allow_loopback: local.allow_loopback,
            members_only: local.cluster_only,
        };
        let (limits, features, third_party) = (local.limits.clone(), local.features.clone(), local.third_party.clone());
        match &self.settings {
            Some(cluster) => {
                policy.denied.extend_from_slice(&cluster.denied);
                turn_core::Settings {
                    realm: cluster.realm.clone(),
                    rest_secrets: self.rest_secrets(cluster),
                    nonce_keys: self.nonce_keys(cluster),
                    nonce_keys_may_lag: self.lags,
                    static_users: cluster.static_users.clone(),
                    policy,
                    limits,
                    features,
                    third_party,
                    alternates,
                    ..turn_core::Settings::default()
                }
            }
            None => turn_core::Settings {
                realm: local.realm.clone(),
                rest_secrets: local.rest_secrets.clone(),
                nonce_keys_may_lag: false,
                nonce_keys: if self.has_credentials(local) { local.nonce_keys.clone() } else { KeyRing::default() },
                static_users: local.static_users.clone(),
                policy,
                limits,
                features,
                third_party,
                alternates,
                ..turn_core::Settings::default()
            },
        }
    }
}

/// Whether newer settings that came from `lineage` did not come from those of this revision. Of what was before the
/// lineage begins nothing is known.
fn is_fork(known: u64, lineage: &[u64]) -> bool {
    lineage.first().is_some_and(|first| known > *first) && !lineage.contains(&known)
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
            lineage: Vec::new(),
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
            cluster_only: false,
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
        assert_eq!(cluster.adopt_settings(&message(), Instant::now()), Ok(Adopted::New));
        cluster.adopt_members(&v1::Members {
            revision: 1,
            members: vec![v1::Member {
                relay_ips: vec!["203.0.113.9".into(), "nonsense".into()],
                ..Default::default()
            }],
            ..v1::Members::default()
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
    fn a_nonce_key_that_was_used_until_it_was_gone_lingers() {
        let mut cluster = Cluster::default();
        let start = Instant::now();
        let (now, later) = (start, start + NONCE_LIFE);
        let keys = |cluster: &Cluster| {
            let settings = cluster.turn_settings(&local(&[]));
            settings.nonce_keys.0.iter().map(|key| key.id).collect::<Vec<_>>()
        };
        let told = |revision, ids: &[u32]| v1::Settings {
            revision,
            nonce_keys: ids.iter().map(|id| secret(*id, &format!("n{id}"))).collect(),
            ..message()
        };
        cluster.adopt_settings(&told(1, &[1]), now).expect("good");
        cluster.adopt_settings(&told(2, &[2, 1]), now).expect("good");
        cluster.adopt_settings(&told(3, &[2]), now).expect("good");
        assert_eq!(keys(&cluster), [2], "it has not been used since it was replaced");
        // Away from here on: two rotations and the end of key 2 go by.
        cluster.adopt_settings(&told(9, &[4, 3]), now).expect("good");
        assert_eq!(keys(&cluster), [4, 3, 2]);
        cluster.adopt_settings(&told(10, &[4]), later - Duration::from_secs(1)).expect("good");
        assert_eq!(keys(&cluster), [4, 2]);
        // Ids come back as other keys.
        let mut reused = cluster.clone();
        reused.adopt_settings(&told(11, &[2, 4]), now).expect("good");
        assert_eq!(keys(&reused), [2, 4]);
        cluster.adopt_settings(&told(11, &[4, 3]), later).expect("good");
        assert_eq!(keys(&cluster), [4, 3]);
    }

    /// What a relay that knows revision 7 makes of revision 9, by the lineage of that.
    #[test]
    fn secrets_that_were_lost_with_the_store_go_on_and_retired_ones_do_not() {
        let told = |revision, lineage: &[u64], secrets: &[&str]| v1::Settings {
            revision,
            lineage: lineage.to_vec(),
            rest_secrets: (1..).zip(secrets).map(|(id, text)| secret(id, text)).collect(),
            ..message()
        };
        let secrets = |cluster: &Cluster| {
            let ring = cluster.turn_settings(&local(&[])).rest_secrets.0;
            ring.into_iter().map(|key| String::from_utf8(key.secret).expect("text")).collect::<Vec<_>>()
        };
        let now = Instant::now();
        let cases: &[(&str, &[u64], &[&str])] = &[
            ("the next", &[5, 7], &["new"]),
            ("one was missed", &[5, 7, 8], &["new"]),
            ("more than is remembered were missed", &[8], &["new"]),
            ("of a version that does not say", &[], &["new"]),
            ("a store made anew", &[0], &["new", "first", "second"]),
            ("a snapshot, and one change", &[3, 5], &["new", "first", "second"]),
            ("a snapshot, and a rotation", &[3, 5, 8], &["new", "first", "second"]),
        ];
        for (what, lineage, expected) in cases {
            let mut cluster = Cluster::default();
            cluster.adopt_settings(&told(7, &[5], &["first", "second"]), now).expect("good");
            let newer = told(9, lineage, &["new"]);
            let adopted = cluster.adopt_settings(&newer, now).expect("good");
            assert_eq!(secrets(&cluster), *expected, "{what}");
            assert_eq!(adopted == Adopted::Forked, expected.len() > 1, "{what}");

            // Started again it knows the same.
            let mut again = Cluster::default();
            again.adopt_kept_settings(&cluster.kept(&newer).encode_to_vec()).expect("good");
            assert_eq!(again.adopt_settings(&newer, now), Ok(Adopted::Known));
            assert_eq!(secrets(&again), *expected, "{what}");

            // What is known again is no orphan, and what has had its time is gone.
            cluster.adopt_settings(&told(10, &[7, 9], &["new", "second"]), now).expect("good");
            let orphans = &expected[1..expected.len().min(2)];
            assert_eq!(secrets(&cluster), [&["new", "second"][..], orphans].concat(), "{what}");
            cluster.adopt_settings(&told(11, &[9, 10], &["new"]), now + CREDENTIAL_LIFE).expect("good");
            assert_eq!(secrets(&cluster), ["new"], "{what}");
        }
    }

    #[test]
    fn who_is_away_may_lag() {
        let mut cluster = Cluster::default();
        assert!(!cluster.lag(true), "nothing is known yet");
        cluster.adopt_settings(&message(), Instant::now()).expect("good");
        assert!(cluster.turn_settings(&local(&[])).nonce_keys_may_lag);
        assert!(cluster.lag(false) && !cluster.lag(false));
        assert!(!cluster.turn_settings(&local(&[])).nonce_keys_may_lag);
        assert_eq!(cluster.revision(), 5);
    }

    #[test]
    fn redirects_are_followed_as_far_as_the_member_list_goes() {
        let mut cluster = Cluster::default();
        let target = v1::RedirectTarget {
            node_id: "eu-2".into(),
            transport: v1::Transport::Udp.into(),
            address: "203.0.113.9:3478".into(),
        };
        let redirects = v1::Redirects { targets: vec![target] };
        assert!(cluster.adopt_redirects(redirects.clone()));
        assert!(!cluster.adopt_redirects(redirects));
        assert!(cluster.turn_settings(&local(&[])).alternates.is_empty(), "it is no member");
        let member = v1::Member { node_id: "eu-2".into(), relay_ips: vec!["203.0.113.9".into()], ..Default::default() };
        cluster.adopt_members(&v1::Members { revision: 1, members: vec![member], ..v1::Members::default() });
        let settings = cluster.turn_settings(&local(&[]));
        assert_eq!(settings.alternates.len(), 1);
        assert!(!settings.draining && !settings.overloaded);
        assert!(cluster.adopt_redirects(v1::Redirects::default()));
        assert!(cluster.turn_settings(&local(&[])).alternates.is_empty());
    }

    #[test]
    fn older_settings_do_not_come_back() {
        let mut cluster = Cluster::default();
        cluster.adopt_settings(&message(), Instant::now()).expect("good");
        assert_eq!(cluster.adopt_settings(&message(), Instant::now()), Ok(Adopted::Known));
        let older = v1::Settings { revision: 4, realm: "older".into(), ..message() };
        assert_eq!(cluster.adopt_settings(&older, Instant::now()), Ok(Adopted::Older(5)));
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
            assert_eq!(cluster.adopt_settings(&settings, Instant::now()), Err(*expected));
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
