//! What DTLS sessions of a certificate have in common: protocol version, ciphers, certificates by SNI, ALPN.

use std::sync::{Arc, Mutex, PoisonError};

use openssl::error::ErrorStack;
use openssl::pkey::PKey;
use openssl::ssl::{
    AlpnError, NameType, SniError, Ssl, SslContext, SslContextBuilder, SslMethod, SslOptions, SslRef,
    SslSessionCacheMode, SslVersion,
};
use openssl::x509::X509;

use crate::certificates::{Certificates, Loaded, Pem};

/// RFC 7443 §3: STUN used for TURN, and for NAT discovery; each behind its length (RFC 7301 §3.1).
const PROTOCOLS: &[u8] = b"\x09stun.turn\x12stun.nat-discovery";
/// Forward secrecy and authenticated encryption (RFC 9325 §4.2), for ECDSA and RSA keys.
const CIPHERS: &str = "ECDHE+AESGCM:ECDHE+CHACHA20";
/// Bytes of a handshake datagram: what every IPv6 link carries (RFC 8200 §5), less the headers of IPv6 and UDP.
const HANDSHAKE_MTU: u32 = 1232;

/// The certificates that new sessions can have. Shared by the workers; replaced whole.
pub(super) struct Context {
    default: SslContext,
}

impl Context {
    /// One of the certificates is chosen by the name the client asks for (RFC 6066 §3), or else the first.
    fn new(loaded: &Arc<Loaded>) -> Result<Self, ErrorStack> {
        let mut contexts = Vec::new();
        for pair in loaded.pairs() {
            contexts.push(builder(pair.pem())?.build());
        }
        let mut builder = match loaded.pairs().first() {
            Some(pair) => builder(pair.pem())?,
            None => SslContext::builder(SslMethod::dtls_server())?,
        };
        let loaded = Arc::clone(loaded);
        builder.set_servername_callback(move |ssl: &mut SslRef, _| {
            let wanted = ssl.servername(NameType::HOST_NAME).and_then(|name| loaded.find(name));
            if let Some(context) = wanted.and_then(|index| contexts.get(index)) {
                ssl.set_ssl_context(context).map_err(|_| SniError::ALERT_FATAL)?;
            }
            Ok(())
        });
        Ok(Self { default: builder.build() })
    }

    /// A session that has not begun.
    pub(super) fn session(&self) -> Result<Ssl, ErrorStack> {
        let mut ssl = Ssl::new(&self.default)?;
        ssl.set_accept_state();
        ssl.set_mtu(HANDSHAKE_MTU)?;
        Ok(ssl)
    }
}

/// The context that new sessions get. One of a process, shared by its workers.
pub(super) struct Contexts {
    certificates: Arc<Certificates>,
    /// Made of the certificates that stand beside it.
    current: Mutex<(Arc<Loaded>, Arc<Context>)>,
}

impl Contexts {
    /// For these certificates.
    ///
    /// # Errors
    /// A pair that OpenSSL does not take.
    pub(super) fn new(certificates: Arc<Certificates>) -> Result<Self, ErrorStack> {
        let loaded = certificates.current();
        let context = Arc::new(Context::new(&loaded)?);
        Ok(Self { certificates, current: Mutex::new((loaded, context)) })
    }

    /// The context of the certificates that are in force now.
    pub(super) fn current(&self) -> Arc<Context> {
        let loaded = self.certificates.current();
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&loaded, &current.0) {
            match Context::new(&loaded) {
                Ok(context) => current.1 = Arc::new(context),
                Err(error) => tracing::error!(%error, "certificates: DTLS keeps the old ones, OpenSSL refuses the new"),
            }
            current.0 = loaded;
        }
        Arc::clone(&current.1)
    }
}

fn builder(pem: &Pem) -> Result<SslContextBuilder, ErrorStack> {
    let mut builder = SslContextBuilder::new(SslMethod::dtls_server())?;
    builder.set_min_proto_version(Some(SslVersion::DTLS1_2))?;
    builder.set_options(
        // Whether a cookie is right has been found out before a session is made.
        SslOptions::COOKIE_EXCHANGE
            | SslOptions::NO_QUERY_MTU
            | SslOptions::NO_RENEGOTIATION
            | SslOptions::NO_COMPRESSION
            | SslOptions::CIPHER_SERVER_PREFERENCE,
    );
    builder.set_cookie_generate_cb(|_, cookie| {
        cookie[0] = 0;
        Ok(1)
    });
    builder.set_cookie_verify_cb(|_, _| true);
    builder.set_cipher_list(CIPHERS)?;
    // Sessions are resumed by tickets (RFC 5077), which cost this side no memory.
    builder.set_session_cache_mode(SslSessionCacheMode::OFF);
    builder.set_alpn_select_callback(|_, offered| {
        // RFC 7301 §3.2: a client that offers protocols, and none of ours, is told so.
        openssl::ssl::select_next_proto(PROTOCOLS, offered).ok_or(AlpnError::ALERT_FATAL)
    });
    let mut chain = X509::stack_from_pem(&pem.certificate)?.into_iter();
    let certificate = match chain.next() {
        Some(certificate) => certificate,
        // Says what is missing.
        None => X509::from_pem(&pem.certificate)?,
    };
    builder.set_certificate(&certificate)?;
    builder.set_private_key(&*PKey::private_key_from_pem(&pem.key)?)?;
    builder.check_private_key()?;
    chain.try_for_each(|certificate| builder.add_extra_chain_cert(certificate))?;
    Ok(builder)
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use super::*;
    use crate::certificates::CertificateFiles;

    /// Writes PEM texts under `directory`.
    pub(in crate::dataplane) fn write(directory: &Path, file: &str, certificate: &str, key: &str) -> CertificateFiles {
        let files = CertificateFiles { certificate: directory.join(file), key: directory.join(format!("{file}.key")) };
        std::fs::write(&files.certificate, certificate).expect("written");
        std::fs::write(&files.key, key).expect("written");
        files
    }

    /// A certificate for these names that vouches for itself.
    pub(in crate::dataplane) fn self_signed(directory: &Path, file: &str, names: &[&str]) -> CertificateFiles {
        let names: Vec<String> = names.iter().map(|name| (*name).into()).collect();
        let made = rcgen::generate_simple_self_signed(names).expect("a certificate");
        write(directory, file, &made.cert.pem(), &made.signing_key.serialize_pem())
    }

    /// The contexts of these files.
    pub(in crate::dataplane) fn contexts(files: &[CertificateFiles]) -> Contexts {
        Contexts::new(Arc::new(Certificates::load(files).expect("good files"))).expect("good pairs")
    }

    #[test]
    fn what_openssl_does_not_take_is_refused() {
        let pem = |certificate: &str, key: &str| Pem { certificate: certificate.into(), key: key.into() };
        let made = |name: &str| rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate");
        let (one, other) = (made("a.example"), made("b.example"));
        let (certificate, key) = (one.cert.pem(), one.signing_key.serialize_pem());
        assert!(builder(&pem(&certificate, &key)).is_ok());
        assert!(builder(&pem(&format!("{certificate}{}", other.cert.pem()), &key)).is_ok(), "a chain");
        let cases = [
            ("nothing", "", ""),
            ("the key of another", &certificate, &other.signing_key.serialize_pem()),
            ("no key", &certificate, &certificate),
            ("no certificate", &key, &key),
        ];
        for (what, certificate, key) in cases {
            assert!(builder(&pem(certificate, key)).is_err(), "{what}");
        }
    }
}
