//! Answers to whoever has not authenticated: challenges (RFC 8489 §9.2.4), never long (abuse.md D), never too many.

use super::auth::Refusal;
use super::reply::Request;
use super::{DropReason, Server, Verdict};
use crate::nonce::{Freshness, SecurityFeatures};
use crate::wire::attribute::{Nonce, PasswordAlgorithms, Realm, ThirdPartyAuthorization};
use crate::wire::error_code::BareErrorCode;
use crate::wire::{Class, ErrorCode, Method};
use crate::{IntegrityKey, PasswordAlgorithm, Transport};

/// IPv4 and UDP headers.
const IPV4_HEADERS: usize = 28;
/// IPv6 and UDP headers.
const IPV6_HEADERS: usize = 48;

/// What a challenge leaves out where it is too long for the request, the least useful first.
#[derive(Clone, Copy, Eq, Ord, PartialEq, PartialOrd)]
enum Brevity {
    Whole,
    /// The reason phrase is for people (RFC 8489 §14.8).
    NoReason,
    /// Eight bytes of MAC do for an hour.
    ShortNonce,
    /// A client that can use it asks with a request that is long enough.
    NoThirdParty,
}

/// The longest STUN message that may answer a request: three times what came, headers of the lower layers counted. A
/// source that a handshake has proved gets whatever there is to say.
fn allowance(request: &Request<'_>) -> usize {
    if request.from.transport != Transport::Udp {
        return usize::MAX;
    }
    let headers = if request.from.client.ip().to_canonical().is_ipv4() { IPV4_HEADERS } else { IPV6_HEADERS };
    3 * (request.message.size() + headers) - headers
}

impl Server {
    /// The answer to a request that is not authenticated.
    pub(super) fn refuse(&mut self, request: &Request<'_>, refusal: Refusal) -> Verdict {
        // Whoever holds an allocation and proves to be its user is none of the strangers.
        let known = matches!(refusal, Refusal::StaleNonce(_)) && self.table.by_five_tuple(&request.from).is_some();
        let silent = matches!(refusal, Refusal::NotYet);
        if !known && !silent && !self.admit_stranger(request) {
            return Verdict::Drop(DropReason::TooManyStrangers);
        }
        match refusal {
            Refusal::BadRequest => self.error(request, ErrorCode::BAD_REQUEST, None, |_| {}),
            Refusal::Unauthenticated => self.challenge(request, ErrorCode::UNAUTHENTICATED, None),
            Refusal::StaleNonce(key) => self.challenge(request, ErrorCode::STALE_NONCE, Some(&key)),
            Refusal::NotYet => Verdict::Drop(DropReason::NotReady),
        }
    }

    /// Whether the prefix of the client may get another answer before it authenticates; counts it.
    pub(super) fn admit_stranger(&mut self, request: &Request<'_>) -> bool {
        self.strangers.admit(request.now.mono, &request.from, self.settings.limits.strangers_per_prefix)
    }

    /// Whether no answer to this request could leave, whatever the answer: its prefix has had its share, and its nonce
    /// is none of ours, so it cannot be authenticated. Cheaper than finding out what the answer would be.
    pub(super) fn is_one_too_many(&self, request: &Request<'_>) -> bool {
        let rate = self.settings.limits.strangers_per_prefix;
        self.strangers.is_exhausted(request.now.mono, &request.from, rate)
            && self.table.by_five_tuple(&request.from).is_none()
            && !matches!(request.message.attribute(), Ok(Some(Nonce(nonce))) if self.is_fresh(request, nonce))
    }

    /// Whether a NONCE was minted for this client, not too long ago.
    pub(super) fn is_fresh(&self, request: &Request<'_>, nonce: &[u8]) -> bool {
        self.freshness(request, nonce).any(|freshness| freshness == Freshness::Fresh)
    }

    /// Whether another member, with newer keys than this one has, may have minted the NONCE of an Allocate.
    pub(super) fn may_be_of_newer_keys(&self, request: &Request<'_>, nonce: &[u8]) -> bool {
        self.settings.nonce_keys_may_lag
            && request.message.method() == Method::Allocate
            && self.freshness(request, nonce).any(|freshness| freshness == Freshness::Unknown)
    }

    /// For each address that the client may have been given a nonce for.
    fn freshness(&self, request: &Request<'_>, nonce: &[u8]) -> impl Iterator<Item = Freshness> {
        let unix_seconds = request.now.wall / 1000;
        let lifetime = self.settings.limits.nonce_lifetime;
        let clients = [Some(request.from.client), request.control].into_iter().flatten();
        clients.map(move |client| self.nonce_keys.verify(nonce, client, unix_seconds, lifetime))
    }

    /// What this server offers. A client that is told of anonymous names must send USERHASH, so it is told only where
    /// every user can be found by it: not those of TURN REST, whose names nobody has a list of, nor a kid.
    fn security_features(&self) -> SecurityFeatures {
        let settings = &*self.settings;
        let password_algorithms = settings.features.sha256;
        let all_are_listed = settings.rest_secrets.0.is_empty() && settings.third_party.is_none();
        SecurityFeatures { password_algorithms, username_anonymity: password_algorithms && all_are_listed }
    }

    /// 401 or 438, with what RFC 8489 §9.2.4 and RFC 7635 §4 put into it.
    fn challenge(&mut self, request: &Request<'_>, code: ErrorCode, key: Option<&IntegrityKey>) -> Verdict {
        let settings = self.settings.clone();
        let features = self.security_features();
        let unix_seconds = request.now.wall / 1000;
        let Some(nonce) = self.nonce_keys.mint(request.from.client, unix_seconds, features) else {
            return Verdict::Drop(DropReason::NotReady);
        };
        let third_party = settings.third_party.as_ref().filter(|_| code == ErrorCode::UNAUTHENTICATED);
        let short_nonce = nonce.shortened();
        let allowance = allowance(request);
        for brevity in [Brevity::Whole, Brevity::NoReason, Brevity::ShortNonce, Brevity::NoThirdParty] {
            let verdict = self.reply_with(request, Class::Error, key, |writer| {
                match brevity {
                    Brevity::Whole => writer.attribute(&code),
                    _ => writer.attribute(&BareErrorCode(code)),
                };
                let nonce = if brevity < Brevity::ShortNonce { &nonce } else { &short_nonce };
                writer.attribute(&Realm(settings.realm.as_bytes())).attribute(&Nonce(nonce.as_bytes()));
                if features.password_algorithms {
                    writer.attribute(&PasswordAlgorithms(&PasswordAlgorithm::OFFERED));
                }
                if let Some(third_party) = third_party.filter(|_| brevity < Brevity::NoThirdParty) {
                    writer.attribute(&ThirdPartyAuthorization(third_party.server_name.as_bytes()));
                }
            });
            if self.reply_len <= allowance {
                return verdict;
            }
        }
        Verdict::Drop(DropReason::Amplification)
    }
}

#[cfg(test)]
#[path = "challenge_tests.rs"]
mod tests;
