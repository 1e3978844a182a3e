//! The table `[third_party]`: authorization servers whose access tokens are taken (RFC 7635).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use turn_core::third_party::{TokenCipher, TokenKey};

use super::ConfigError;

/// Third-party authorization; without a server name it is switched off.
#[derive(Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ThirdParty {
    /// THIRD-PARTY-AUTHORIZATION (RFC 7635 §6.1): the name that tokens for this server are sealed for, 1..=255 bytes.
    pub server_name: String,
    /// Keys shared with authorization servers.
    pub keys: Vec<Key>,
}

/// A key that tokens are sealed with (RFC 7635 §4.1.2).
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// What clients send as USERNAME.
    pub kid: String,
    /// The key, in base64: 32 bytes for A256GCM, 16 for A128GCM.
    pub key: String,
    /// `A256GCM` or `A128GCM` (RFC 7518 §5.1).
    #[serde(default)]
    pub algorithm: Algorithm,
}

/// Authenticated encryption of tokens.
#[derive(Clone, Copy, Default, Deserialize, Eq, PartialEq)]
pub enum Algorithm {
    /// AES-256-GCM.
    #[default]
    #[serde(rename = "A256GCM")]
    A256Gcm,
    /// AES-128-GCM.
    #[serde(rename = "A128GCM")]
    A128Gcm,
}

impl ThirdParty {
    /// What the protocol is told; none if it is switched off.
    pub(super) fn check(&self) -> Result<Option<turn_core::ThirdParty>, ConfigError> {
        if self.server_name.is_empty() && self.keys.is_empty() {
            return Ok(None);
        }
        if !(1..=255).contains(&self.server_name.len()) {
            let problem = "must have 1 to 255 bytes: the name that the authorization server seals tokens for";
            return Err(ConfigError::new("third_party.server_name", problem));
        }
        if self.keys.is_empty() {
            let problem = "is empty; name at least one { kid = \"...\", key = \"BASE64\" }";
            return Err(ConfigError::new("third_party.keys", problem));
        }
        let mut keys: Vec<TokenKey> = Vec::new();
        for (index, key) in self.keys.iter().enumerate() {
            let key = key.check(index)?;
            if keys.iter().any(|other| other.kid == key.kid) {
                let problem = "is a kid that another key has; each key needs its own";
                return Err(ConfigError::new(format!("third_party.keys[{index}].kid"), problem));
            }
            keys.push(key);
        }
        Ok(Some(turn_core::ThirdParty { server_name: self.server_name.clone(), keys }))
    }
}

impl Key {
    fn check(&self, index: usize) -> Result<TokenKey, ConfigError> {
        let wrong =
            |field: &str, problem: String| ConfigError::new(format!("third_party.keys[{index}].{field}"), problem);
        if !(1..=TokenKey::MAX_KID).contains(&self.kid.len()) {
            return Err(wrong("kid", format!("must have 1 to {} bytes", TokenKey::MAX_KID)));
        }
        let bytes = STANDARD.decode(&self.key).map_err(|_| wrong("key", "is not base64".into()))?;
        let length = bytes.len();
        let of_length = |wanted: usize, name: &str, make: &str| {
            wrong(
                "key",
                format!("has {length} bytes, {name} takes {wanted}; make one with: openssl rand -base64 {make}"),
            )
        };
        let cipher = match self.algorithm {
            Algorithm::A256Gcm => TokenCipher::A256Gcm(bytes.try_into().map_err(|_| of_length(32, "A256GCM", "32"))?),
            Algorithm::A128Gcm => TokenCipher::A128Gcm(bytes.try_into().map_err(|_| of_length(16, "A128GCM", "16"))?),
        };
        Ok(TokenKey { kid: self.kid.as_bytes().to_vec(), cipher })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;

    fn key(length: usize) -> String {
        STANDARD.encode(vec![7; length])
    }

    #[test]
    fn what_is_written_is_checked() {
        let good = |algorithm: &str, length| {
            format!(
                "server_name = \"turn.example.org\"\nkeys = [{{ kid = \"a\", key = \"{}\"{algorithm} }}]",
                key(length)
            )
        };
        let cases: &[(&str, String, Result<usize, &str>)] = &[
            ("nothing", String::new(), Ok(0)),
            ("A256GCM", good("", 32), Ok(1)),
            ("A256GCM by name", good(", algorithm = \"A256GCM\"", 32), Ok(1)),
            ("A128GCM", good(", algorithm = \"A128GCM\"", 16), Ok(1)),
            (
                "too short",
                good("", 16),
                Err("third_party.keys[0].key: has 16 bytes, A256GCM takes 32; make one with: openssl"),
            ),
            (
                "too long",
                good(", algorithm = \"A128GCM\"", 32),
                Err("third_party.keys[0].key: has 32 bytes, A128GCM takes 16"),
            ),
            (
                "no name",
                format!("keys = [{{ kid = \"a\", key = \"{}\" }}]", key(32)),
                Err("third_party.server_name: must have"),
            ),
            ("no keys", "server_name = \"x\"".into(), Err("third_party.keys: is empty; name at least one")),
            (
                "not base64",
                "server_name = \"x\"\nkeys = [{ kid = \"a\", key = \"?\" }]".into(),
                Err("third_party.keys[0].key: is not base64"),
            ),
            (
                "empty kid",
                format!("server_name = \"x\"\nkeys = [{{ kid = \"\", key = \"{}\" }}]", key(32)),
                Err("third_party.keys[0].kid: must have 1 to 491 bytes"),
            ),
            (
                "one kid twice",
                format!(
                    "server_name = \"x\"\nkeys = [{{ kid = \"a\", key = \"{0}\" }}, {{ kid = \"a\", key = \"{0}\" }}]",
                    key(32)
                ),
                Err("third_party.keys[1].kid: is a kid that another key has"),
            ),
        ];
        for (what, text, expected) in cases {
            let config =
                Config::parse(&format!("[third_party]\n{text}")).unwrap_or_else(|error| panic!("{what}: {error}"));
            match (config.third_party.check(), expected) {
                (Ok(checked), Ok(keys)) => assert_eq!(checked.map_or(0, |checked| checked.keys.len()), *keys, "{what}"),
                (Err(error), Err(start)) => assert!(error.to_string().starts_with(start), "{what}: {error}"),
                (result, _) => panic!("{what}: {result:?}"),
            }
        }
    }

    #[test]
    fn an_unknown_algorithm_names_its_key() {
        let text =
            "[third_party]\nserver_name = \"x\"\nkeys = [{ kid = \"a\", key = \"\", algorithm = \"A256CBC-HS512\" }]";
        let error = Config::parse(text).map(|_| ()).expect_err("not offered").to_string();
        assert!(error.starts_with("third_party.keys[0].algorithm: unknown variant"), "{error}");
    }
}
