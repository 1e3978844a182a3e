//! How a client proves who it is: what a 401 or 438 said, and what is made of it (RFC 8489 §9.2.5, RFC 7635 §5).

use super::{ClientConfig, Request};
use crate::IntegrityKey;
use crate::key::{PasswordAlgorithm, userhash};
use crate::nonce::SecurityFeatures;
use crate::wire::attribute::{
    AccessToken, Nonce, PasswordAlgorithm as PasswordAlgorithmAttribute, PasswordAlgorithms, Realm, Userhash, Username,
};
use crate::wire::{AttributeType, Integrity, Message, MessageWriter};

/// Which of the mechanisms a client knows.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Security {
    /// MD5 and MESSAGE-INTEGRITY whatever the server offers, as most clients do.
    Rfc5389,
    /// What the server offers: the first algorithm of its list that is known here, MESSAGE-INTEGRITY-SHA256, and
    /// USERHASH where the nonce asks for it (RFC 8489 §9.2.5).
    #[default]
    Rfc8489,
    /// As [`Security::Rfc8489`], with USERHASH unasked.
    Userhash,
    /// An access token (RFC 7635 §5). The user name is the kid.
    Token {
        /// ACCESS-TOKEN, in binary.
        token: Vec<u8>,
        /// The session key that the authorization server gave along, at most 64 bytes.
        mac_key: Vec<u8>,
    },
}

/// What is known since the server has refused a request.
#[derive(Debug)]
pub(super) struct Challenge {
    realm: Vec<u8>,
    nonce: Vec<u8>,
    /// PASSWORD-ALGORITHMS as it came, and what was chosen of it.
    algorithms: Option<(Vec<u8>, PasswordAlgorithm)>,
    /// USERHASH stands for USERNAME.
    anonymous: bool,
    key: IntegrityKey,
}

impl Challenge {
    /// Reads a 401 or 438; `None` where RFC 8489 §9.2.5 forbids another attempt.
    pub(super) fn read(config: &ClientConfig, security: &Security, message: &Message<'_>) -> Option<Self> {
        let Realm(realm) = message.attribute().ok()??;
        let Nonce(nonce) = message.attribute().ok()??;
        let features = SecurityFeatures::of(nonce).unwrap_or_default();
        let offered = message.attribute().ok().flatten().map(|PasswordAlgorithms(offered)| offered);
        let (algorithms, anonymous) = match security {
            Security::Rfc5389 | Security::Token { .. } => (None, false),
            Security::Rfc8489 | Security::Userhash => {
                // The offer was taken out on the way.
                if features.password_algorithms && offered.is_none() {
                    return None;
                }
                let chosen = match offered {
                    Some(offered) => Some((offered.to_vec(), PasswordAlgorithm::first_known(offered)?)),
                    None => None,
                };
                (chosen, features.username_anonymity || *security == Security::Userhash)
            }
        };
        let key = match (security, &algorithms) {
            (Security::Token { mac_key, .. }, _) => IntegrityKey::new(mac_key, Integrity::Sha1)?,
            (_, Some((_, algorithm))) => {
                // RFC 8489 §9.2.5: once algorithms were offered, by SHA-256 only.
                IntegrityKey::long_term(*algorithm, &config.username, realm, &config.password).with(Integrity::Sha256)
            }
            (_, None) => IntegrityKey::long_term(PasswordAlgorithm::Md5, &config.username, realm, &config.password),
        };
        Some(Self { realm: realm.to_vec(), nonce: nonce.to_vec(), algorithms, anonymous, key })
    }

    /// Signs a request.
    pub(super) fn sign(
        &self,
        config: &ClientConfig,
        security: &Security,
        request: &Request,
        writer: &mut MessageWriter<'_>,
    ) {
        if self.anonymous {
            writer.attribute(&Userhash(userhash(&config.username, &self.realm)));
        } else {
            writer.attribute(&Username(&config.username));
        }
        writer.attribute(&Realm(&self.realm)).attribute(&Nonce(&self.nonce));
        if let Some((offered, chosen)) = &self.algorithms {
            writer.attribute(&PasswordAlgorithms(offered));
            writer.attribute(&PasswordAlgorithmAttribute(&chosen.to_value()));
        }
        // RFC 7635 §9.
        if let (Security::Token { token, .. }, Request::Allocate(_) | Request::Refresh(_)) = (security, request) {
            writer.attribute(&AccessToken(token));
        }
        self.key.sign(writer);
    }

    /// Whether an answer is the server's: by whichever attribute it has.
    pub(super) fn verifies(&self, message: &Message<'_>) -> bool {
        let integrity =
            if message.contains(AttributeType::MESSAGE_INTEGRITY_SHA256) { Integrity::Sha256 } else { Integrity::Sha1 };
        self.key.with(integrity).verifies(message)
    }
}
