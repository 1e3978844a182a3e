//! Requests as the request files see them, and the answers they get.

use std::net::SocketAddr;

use super::auth::User;
use super::table::Slot;
use super::{Now, Out, Server, Verdict};
use crate::wire::attribute::Software;
use crate::wire::{
    AttributeSet, AttributeType, Class, ErrorCode, Message, MessageWriter, Method, PreparedKey, TransactionId,
    WriteError,
};
use crate::{FiveTuple, IntegrityKey, Path};

/// Room for an answer. The longest, a 401, has a realm of at most 508 bytes (RFC 8489 §14.9) and a server name of at
/// most 255 (RFC 7635 §6.1), and stays below 900.
pub(super) const REPLY: usize = 1024;

/// What SOFTWARE says in answers to Allocate and Refresh (RFC 8656 §5), once the client is known.
const SOFTWARE: Software<'static> = Software(concat!("turnpike/", env!("CARGO_PKG_VERSION")).as_bytes());

/// Attributes with a name that ask for what is not offered: unknown to this server (RFC 8489 §6.3.1, RFC 8656 §7.2).
const DECLINED: AttributeSet =
    AttributeSet::of(&[AttributeType::CHANGE_REQUEST, AttributeType::PADDING, AttributeType::RESPONSE_PORT]);

/// Of RFC 8489 §9.2, where SHA-256 is switched off.
const OF_SHA256: AttributeSet = AttributeSet::of(&[AttributeType::PASSWORD_ALGORITHM, AttributeType::USERHASH]);
/// Of RFC 6062, where TCP allocations are switched off.
const OF_TCP: AttributeSet = AttributeSet::of(&[AttributeType::CONNECTION_ID]);
/// Of RFC 7635, where no authorization server is configured (§7: 420).
const OF_THIRD_PARTY: AttributeSet = AttributeSet::of(&[AttributeType::ACCESS_TOKEN]);

/// A request and where it came from.
pub(super) struct Request<'a> {
    pub(super) now: Now,
    pub(super) from: FiveTuple,
    pub(super) path: Path,
    pub(super) message: Message<'a>,
    /// Of a ConnectionBind: where its control connection comes from, whose nonce it may bring (RFC 6062 §4.3).
    pub(super) control: Option<SocketAddr>,
}

impl Request<'_> {
    /// What its answer needs to know of it.
    pub(super) fn asked(&self) -> Asked {
        Asked {
            from: self.from,
            path: self.path,
            method: self.message.method(),
            transaction_id: self.message.transaction_id(),
            fingerprint: self.message.contains(AttributeType::FINGERPRINT),
        }
    }
}

/// What an answer is signed with.
#[derive(Clone, Copy)]
pub(super) struct Signer<'a> {
    key: &'a IntegrityKey,
    /// The same key, where it is kept prepared.
    prepared: Option<&'a PreparedKey>,
}

impl<'a> From<&'a IntegrityKey> for Signer<'a> {
    fn from(key: &'a IntegrityKey) -> Self {
        Self { key, prepared: None }
    }
}

/// What is kept of a request that is answered later.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    from: FiveTuple,
    path: Path,
    method: Method,
    transaction_id: TransactionId,
    fingerprint: bool,
}

impl Server {
    /// The allocation that a request other than Allocate is about (RFC 8656 §5).
    pub(super) fn held(&mut self, request: &Request<'_>, user: &User<'_>) -> Result<Slot, ErrorCode> {
        let slot = self.table.by_five_tuple(&request.from).ok_or(ErrorCode::ALLOCATION_MISMATCH)?;
        if *self.table.get(slot).username != *user.name {
            return Err(ErrorCode::WRONG_CREDENTIALS);
        }
        self.table.set_datagram_path(slot, &request.from, request.path);
        Ok(slot)
    }

    /// A signed success answer.
    pub(super) fn success(
        &mut self,
        request: &Request<'_>,
        user: &User<'_>,
        write: impl FnOnce(&mut MessageWriter<'_>),
    ) -> Verdict {
        let signer = Signer { key: &user.key, prepared: user.prepared };
        self.answer(&request.asked(), Class::Success, Some(signer), write)
    }

    /// An error answer, signed if there is a key.
    pub(super) fn error(
        &mut self,
        request: &Request<'_>,
        code: ErrorCode,
        key: Option<&IntegrityKey>,
        write: impl FnOnce(&mut MessageWriter<'_>),
    ) -> Verdict {
        self.reply_with(request, Class::Error, key, |writer| {
            writer.attribute(&code);
            write(writer);
        })
    }

    /// 420 if the request has an attribute that this server must understand and does not.
    pub(super) fn refuse_unknown(&mut self, request: &Request<'_>, key: Option<&IntegrityKey>) -> Option<Verdict> {
        let unknown = request.message.unknown_attributes(self.declined());
        if unknown.is_empty() {
            return None;
        }
        Some(self.error(request, ErrorCode::UNKNOWN_ATTRIBUTE, key, |writer| {
            writer.attribute(&unknown);
        }))
    }

    /// What is unknown to this server as it is configured.
    pub(super) fn declined(&self) -> AttributeSet {
        let mut declined = DECLINED;
        if !self.settings.features.sha256 {
            declined = declined.union(OF_SHA256);
        }
        if !self.settings.features.tcp_allocations {
            declined = declined.union(OF_TCP);
        }
        if self.settings.third_party.is_none() {
            declined = declined.union(OF_THIRD_PARTY);
        }
        declined
    }

    pub(super) fn reply_with(
        &mut self,
        request: &Request<'_>,
        class: Class,
        key: Option<&IntegrityKey>,
        write: impl FnOnce(&mut MessageWriter<'_>),
    ) -> Verdict {
        self.answer(&request.asked(), class, key.map(Signer::from), write)
    }

    /// As [`Server::reply_with`], to a request of now or of before.
    pub(super) fn answer(
        &mut self,
        asked: &Asked,
        class: Class,
        signer: Option<Signer<'_>>,
        write: impl FnOnce(&mut MessageWriter<'_>),
    ) -> Verdict {
        let Asked { from, path, method, transaction_id, fingerprint } = *asked;
        let mut writer = MessageWriter::new(&mut self.reply[..], class, method, transaction_id);
        write(&mut writer);
        if let Some(Signer { key, prepared }) = signer {
            if matches!(method, Method::Allocate | Method::Refresh) {
                writer.attribute(&SOFTWARE);
            }
            match prepared {
                Some(prepared) => drop(writer.sign_prepared(prepared)),
                None => key.sign(&mut writer),
            }
        }
        // RFC 8489 §14.7 leaves it to each side; a client that sends it may need it to tell STUN from its media.
        if fingerprint {
            writer.fingerprint();
        }
        match writer.finish() {
            Ok(len) => {
                self.reply_len = len;
                Verdict::Reply { out: Out::Client { to: from, path } }
            }
            // Only a realm beyond its bound is that long.
            Err(WriteError) => Verdict::Done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lab::Lab;
    use super::*;

    #[test]
    fn the_longest_realm_fits() {
        let mut lab = Lab::new();
        lab.from.transport = crate::Transport::Tcp;
        let server_name = "n".repeat(255);
        lab.configure(|settings| {
            settings.realm = "\u{10FFFF}".repeat(127);
            settings.third_party = Some(crate::ThirdParty { server_name, keys: Vec::new() });
        });
        let reply = lab.unsigned(Method::Allocate, |writer| {
            writer.fingerprint();
        });
        assert_eq!(reply.code(), 401);
    }
}
