//! The certificates that clients meet on TLS and DTLS: read at start, read anew when a file changes.
//!
//! The first pair is the default; others are chosen by the names in their certificates (SNI, RFC 6066 §3). Whoever
//! holds an [`Arc<Certificates>`] sees a new pair with the next handshake; connections that exist are not touched.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::client::verify_server_name;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert};
use rustls::sign::CertifiedKey;

/// How often the files are looked at. A change is in force within two looks.
const LOOK: Duration = Duration::from_millis(500);

/// The files of one certificate.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CertificateFiles {
    /// PEM: the certificate first, then its chain.
    pub certificate: PathBuf,
    /// PEM: its key (PKCS #8, PKCS #1 or SEC 1).
    pub key: PathBuf,
}

/// Why a pair of files cannot be served.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum CertificateError {
    /// A file cannot be read.
    #[error("cannot read {file}: {error}")]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// The system's words.
        error: String,
    },
    /// The certificate file holds no certificate.
    #[error("{file} holds no PEM block \"BEGIN CERTIFICATE\"")]
    NoCertificate {
        /// The file.
        file: PathBuf,
    },
    /// The key file holds no key.
    #[error("{file} holds no PEM block \"PRIVATE KEY\"; keys with a passphrase are not read")]
    NoKey {
        /// The file.
        file: PathBuf,
    },
    /// Key and certificate are no pair, or of a kind that is not supported.
    #[error("{certificate} and {key} cannot be used together: {error}")]
    NoPair {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// The library's words.
        error: String,
    },
}

/// The texts of one pair of files.
#[derive(Clone, Eq, PartialEq)]
pub struct Pem {
    /// The certificate, then its chain.
    pub certificate: Vec<u8>,
    /// Its key.
    pub key: Vec<u8>,
}

/// One certificate that can be served.
pub struct Pair {
    pem: Pem,
    key: Arc<CertifiedKey>,
}

impl Pair {
    /// The PEM texts it was made of.
    pub fn pem(&self) -> &Pem {
        &self.pem
    }

    /// Whether the certificate is valid for this DNS name or IP address, wildcards included (RFC 6125 §6.4).
    pub fn names(&self, name: &str) -> bool {
        let Ok(name) = ServerName::try_from(name) else {
            return false;
        };
        let certificate = self.key.end_entity_cert().ok().and_then(|der| ParsedCertificate::try_from(der).ok());
        certificate.is_some_and(|certificate| verify_server_name(&certificate, &name).is_ok())
    }

    fn make(files: &CertificateFiles, pem: Pem) -> Result<Self, CertificateError> {
        let chain: Vec<CertificateDer<'static>> =
            CertificateDer::pem_slice_iter(&pem.certificate).collect::<Result<_, _>>().unwrap_or_default();
        if chain.is_empty() {
            return Err(CertificateError::NoCertificate { file: files.certificate.clone() });
        }
        let key =
            PrivateKeyDer::from_pem_slice(&pem.key).map_err(|_| CertificateError::NoKey { file: files.key.clone() })?;
        let no_pair = |error: &dyn fmt::Display| CertificateError::NoPair {
            certificate: files.certificate.clone(),
            key: files.key.clone(),
            error: error.to_string(),
        };
        ParsedCertificate::try_from(&chain[0]).map_err(|error| no_pair(&error))?;
        let key = CertifiedKey::from_der(chain, key, &ring::default_provider()).map_err(|error| no_pair(&error))?;
        Ok(Self { pem, key: Arc::new(key) })
    }
}

/// All pairs of one moment, in the order of the configuration; at least one.
pub struct Loaded {
    pairs: Vec<Pair>,
}

impl Loaded {
    /// The pairs; the first is the default.
    pub fn pairs(&self) -> &[Pair] {
        &self.pairs
    }

    /// Place in [`Loaded::pairs`] of the one that a client asks for by this name; none if no certificate names it.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.pairs.iter().position(|pair| pair.names(name))
    }
}

/// The certificates in force.
pub struct Certificates {
    files: Vec<CertificateFiles>,
    current: ArcSwap<Loaded>,
}

impl Certificates {
    /// Reads the files.
    ///
    /// # Errors
    /// The place of the first pair that cannot be served, and why.
    pub fn load(files: &[CertificateFiles]) -> Result<Self, (usize, CertificateError)> {
        let pair = |(index, files): (usize, &CertificateFiles)| {
            read(files).and_then(|pem| Pair::make(files, pem)).map_err(|error| (index, error))
        };
        let pairs = files.iter().enumerate().map(pair).collect::<Result<_, _>>()?;
        Ok(Self { files: files.to_vec(), current: ArcSwap::from_pointee(Loaded { pairs }) })
    }

    /// What is in force now. A new `Arc` whenever a file has changed: comparing pointers tells.
    pub fn current(&self) -> Arc<Loaded> {
        self.current.load_full()
    }

    /// Looks at the files for ever, and takes over what changed. A pair that cannot be served is refused with one
    /// ERROR line, and the old one stays. Reads files: to be run off the packet threads.
    pub async fn watch(self: Arc<Self>) {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut watch = Watch::default();
        loop {
            looks.tick().await;
            let this = Arc::clone(&self);
            let look = tokio::task::spawn_blocking(move || {
                this.look(&mut watch);
                watch
            });
            match look.await {
                Ok(back) => watch = back,
                // The runtime ends.
                Err(_) => return,
            }
        }
    }

    /// One look.
    fn look(&self, watch: &mut Watch) {
        let current = self.current();
        let mut changed = false;
        let mut pairs = Vec::with_capacity(self.files.len());
        let mut broken = Vec::new();
        for (files, old) in self.files.iter().zip(&current.pairs) {
            let keep = || Pair { pem: old.pem.clone(), key: Arc::clone(&old.key) };
            let pair = match read(files) {
                Ok(pem) if pem == old.pem => Ok(keep()),
                Ok(pem) => Pair::make(files, pem),
                Err(error) => Err(error),
            };
            match pair {
                Ok(pair) => {
                    changed |= pair.pem != old.pem;
                    pairs.push(pair);
                }
                Err(error) => {
                    broken.push(error);
                    pairs.push(keep());
                }
            }
        }
        for error in &broken {
            // A certificate is replaced a moment before its key: only what is still wrong at the next look is said.
            if watch.seen.contains(error) && !watch.said.contains(error) {
                tracing::error!("certificates: {error}; the old one stays in use until the files are right");
                watch.said.push(error.clone());
            }
        }
        watch.said.retain(|error| broken.contains(error));
        watch.seen = broken;
        if changed {
            self.current.store(Arc::new(Loaded { pairs }));
            tracing::info!("certificates were read anew; new connections get them");
        }
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Certificates").field("files", &self.files).finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let loaded = self.current.load();
        let named = hello.server_name().and_then(|name| loaded.find(name)).unwrap_or(0);
        loaded.pairs.get(named).map(|pair| Arc::clone(&pair.key))
    }
}

/// What earlier looks found wrong.
#[derive(Default)]
struct Watch {
    seen: Vec<CertificateError>,
    said: Vec<CertificateError>,
}

fn read(files: &CertificateFiles) -> Result<Pem, CertificateError> {
    let read = |file: &PathBuf| {
        std::fs::read(file)
            .map_err(|error| CertificateError::Unreadable { file: file.clone(), error: error.to_string() })
    };
    Ok(Pem { certificate: read(&files.certificate)?, key: read(&files.key)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A self-signed certificate for `name` under `directory`.
    fn write(directory: &std::path::Path, file: &str, name: &str) -> anyhow::Result<CertificateFiles> {
        let made = rcgen::generate_simple_self_signed([name.to_owned()])?;
        let files = CertificateFiles {
            certificate: directory.join(format!("{file}.pem")),
            key: directory.join(format!("{file}.key")),
        };
        std::fs::write(&files.certificate, made.cert.pem())?;
        std::fs::write(&files.key, made.signing_key.serialize_pem())?;
        Ok(files)
    }

    #[test]
    fn names_choose_wildcards_count_and_the_first_is_the_default() -> anyhow::Result<()> {
        let directory = tempfile::tempdir()?;
        let files = [
            write(directory.path(), "a", "turn.example.org")?,
            write(directory.path(), "b", "*.example.net")?,
            write(directory.path(), "c", "192.0.2.1")?,
        ];
        let loaded = Certificates::load(&files).map_err(|(_, error)| error)?.current();
        let cases = [
            ("turn.example.org", Some(0)),
            ("TURN.example.org", Some(0)),
            ("eu-1.example.net", Some(1)),
            ("a.b.example.net", None),
            ("192.0.2.1", Some(2)),
            ("www.example.org", None),
            ("not a name", None),
        ];
        for (name, expected) in cases {
            assert_eq!(loaded.find(name), expected, "{name}");
        }
        Ok(())
    }

    #[test]
    fn a_change_is_taken_over_and_a_broken_one_is_not() -> anyhow::Result<()> {
        let directory = tempfile::tempdir()?;
        let files = write(directory.path(), "a", "old.example.org")?;
        let other = write(directory.path(), "b", "other.example.org")?;
        let certificates = Certificates::load(&[files.clone(), other]).map_err(|(_, error)| error)?;
        let first = certificates.current();
        let mut watch = Watch::default();
        certificates.look(&mut watch);
        assert!(Arc::ptr_eq(&first, &certificates.current()), "nothing has changed");

        write(directory.path(), "a", "new.example.org")?;
        certificates.look(&mut watch);
        assert_eq!(certificates.current().find("new.example.org"), Some(0));
        assert_eq!(certificates.current().find("other.example.org"), Some(1));

        // Half of a pair, nonsense, nothing: the old one stays, and it is said once.
        std::fs::copy(directory.path().join("b.pem"), &files.certificate)?;
        for _ in 0..4 {
            certificates.look(&mut watch);
        }
        assert!(matches!(watch.said[..], [CertificateError::NoPair { .. }]), "{:?}", watch.said);
        std::fs::write(&files.key, "no key")?;
        certificates.look(&mut watch);
        certificates.look(&mut watch);
        assert!(matches!(watch.said[..], [CertificateError::NoKey { .. }]), "{:?}", watch.said);
        std::fs::remove_file(&files.certificate)?;
        certificates.look(&mut watch);
        assert_eq!(certificates.current().find("new.example.org"), Some(0));

        write(directory.path(), "a", "newer.example.org")?;
        certificates.look(&mut watch);
        assert_eq!(certificates.current().find("newer.example.org"), Some(0));
        assert!(watch.said.is_empty() && watch.seen.is_empty());
        Ok(())
    }

    #[test]
    fn what_cannot_be_served_is_named() -> anyhow::Result<()> {
        let directory = tempfile::tempdir()?;
        let good = write(directory.path(), "a", "a.example.org")?;
        let other = write(directory.path(), "b", "b.example.org")?;
        let load = |certificate: &PathBuf, key: &PathBuf| {
            let bad = CertificateFiles { certificate: certificate.clone(), key: key.clone() };
            Certificates::load(&[good.clone(), bad]).expect_err("refused")
        };
        let (index, error) = load(&good.certificate, &other.key);
        assert!(index == 1 && error.to_string().contains("a.pem and "), "{error}");
        let (_, error) = load(&good.key, &good.key);
        assert!(error.to_string().ends_with("holds no PEM block \"BEGIN CERTIFICATE\""), "{error}");
        let (_, error) = load(&good.certificate, &good.certificate);
        assert!(error.to_string().contains("holds no PEM block \"PRIVATE KEY\""), "{error}");
        let (_, error) = load(&directory.path().join("none"), &good.key);
        assert!(error.to_string().starts_with("cannot read "), "{error}");
        Ok(())
    }
}
