//! The cluster's certificates: one certificate authority, one certificate for each member and person.
//!
//! Identity is a URI in the subject alternative name, `turnpike://<role>/<name>`; servers and relays read nothing
//! else from a certificate. Keys are ECDSA P-256. Key files are made with mode 0600 and never replaced unasked.

use std::fmt;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::files;

/// Server name every controller's certificate carries, whatever its address; clients verify against it.
pub const CONTROLLER_NAME: &str = "controller.turnpike";

/// Name of the authority's certificate in its directory; what members are given as `ca`.
pub const CA_CERTIFICATE: &str = "ca.pem";
/// Name of the authority's key in its directory; never leaves it.
pub const CA_KEY: &str = "ca.key";

/// Life of an authority.
const CA_VALIDITY: Duration = Duration::from_secs(3650 * 86_400);
/// Clocks of members may be this far behind the issuer's.
const BACKDATED: Duration = Duration::from_secs(3600);

/// Why a certificate could not be made, read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PkiError {
    /// A node, controller or person name that has no place in a URI and a file name.
    #[error(
        "'{0}' is no name for a certificate: use 1 to 63 letters, digits, '.', '_' or '-', starting with a letter or digit"
    )]
    Name(String),
    /// A DNS name that is not one.
    #[error("'{0}' is not a DNS name")]
    DnsName(String),
    /// A validity of nothing, or past the end of time.
    #[error("a validity of {} days is out of range", .0.as_secs() / 86_400)]
    Validity(Duration),
    /// The authority's own certificate is over.
    #[error("the certificate authority expired on {0}; make a new one with 'turnctl ca init'")]
    AuthorityExpired(String),
    /// The certificate is not an authority's, or the key is another one's.
    #[error("{0}")]
    Authority(&'static str),
    /// Bytes that are no certificate or key.
    #[error("cannot read the {what}: {reason}")]
    Pem {
        /// Certificate or key.
        what: &'static str,
        /// What the parser says.
        reason: String,
    },
    /// The generator refused.
    #[error("cannot make the certificate: {0}")]
    Generate(#[from] rcgen::Error),
    /// The file is there already.
    #[error("{} exists and is left alone; --force replaces it", .0.display())]
    Exists(PathBuf),
    /// The file system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// Read, write or create.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Who a certificate speaks for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Identity {
    /// A relay, by its node id.
    Relay(String),
    /// A controller replica, by its id.
    Controller(String),
    /// A person or program that may look.
    Viewer(String),
    /// A person or program that may also revoke, discover and mint credentials.
    Operator(String),
    /// A person or program that may do everything.
    Admin(String),
}

impl Identity {
    /// The role, as it stands in the URI.
    pub fn role(&self) -> &'static str {
        match self {
            Self::Relay(_) => "relay",
            Self::Controller(_) => "controller",
            Self::Viewer(_) => "viewer",
            Self::Operator(_) => "operator",
            Self::Admin(_) => "admin",
        }
    }

    /// The name within the role.
    pub fn name(&self) -> &str {
        match self {
            Self::Relay(name)
            | Self::Controller(name)
            | Self::Viewer(name)
            | Self::Operator(name)
            | Self::Admin(name) => name,
        }
    }

    /// Reads `turnpike://<role>/<name>`; `None` for anything else.
    pub fn from_uri(uri: &str) -> Option<Self> {
        let (role, name) = uri.strip_prefix("turnpike://")?.split_once('/')?;
        let identity = match role {
            "relay" => Self::Relay(name.into()),
            "controller" => Self::Controller(name.into()),
            "viewer" => Self::Viewer(name.into()),
            "operator" => Self::Operator(name.into()),
            "admin" => Self::Admin(name.into()),
            _ => return None,
        };
        is_name(name).then_some(identity)
    }

    /// Name of this identity's files, without `.pem` and `.key`: `relay-eu-1`.
    pub fn file_stem(&self) -> String {
        format!("{}-{}", self.role(), self.name())
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "turnpike://{}/{}", self.role(), self.name())
    }
}

/// Whether `name` may stand in a URI and a file name as it is.
fn is_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

/// A certificate and its private key, both PEM.
#[derive(Clone)]
pub struct CertificateAndKey {
    /// The certificate.
    pub certificate: String,
    /// The private key, PKCS #8.
    pub key: String,
}

impl CertificateAndKey {
    /// Writes `<directory>/<stem>.pem` and `<stem>.key` and says where. Makes the directory (0700) when it is missing.
    pub fn write(&self, directory: &Path, stem: &str, replace: bool) -> Result<(PathBuf, PathBuf), PkiError> {
        let certificate = directory.join(format!("{stem}.pem"));
        let key = directory.join(format!("{stem}.key"));
        write_pair([(&certificate, &self.certificate, 0o644), (&key, &self.key, 0o600)], replace)?;
        Ok((certificate, key))
    }
}

impl fmt::Debug for CertificateAndKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateAndKey").finish_non_exhaustive()
    }
}

/// A certificate authority with its key.
pub struct Ca {
    certificate: String,
    not_after: OffsetDateTime,
    issuer: Issuer<'static, KeyPair>,
}

/// Makes a new authority; `name` is its common name, for people.
pub fn create_ca(name: &str) -> Result<Ca, PkiError> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let now = OffsetDateTime::now_utc();
    params.not_before = now - BACKDATED;
    params.not_after = now + CA_VALIDITY;
    let certificate = params.self_signed(&key)?.pem();
    let not_after = params.not_after;
    Ok(Ca { certificate, not_after, issuer: Issuer::new(params, key) })
}

impl Ca {
    /// Reads an authority from its two PEM texts; the key must be the certificate's.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, PkiError> {
        let key =
            KeyPair::from_pem(key).map_err(|e| PkiError::Pem { what: "authority's key", reason: e.to_string() })?;
        let facts = Facts::from_pem(certificate)?;
        if !facts.is_ca {
            return Err(PkiError::Authority("the certificate is not a certificate authority's"));
        }
        if facts.public_key != key.public_key_raw() {
            return Err(PkiError::Authority("the authority's key is not the key of its certificate"));
        }
        let issuer = Issuer::from_ca_cert_pem(certificate, key)?;
        Ok(Self { certificate: certificate.to_owned(), not_after: facts.not_after, issuer })
    }

    /// Reads `ca.pem` and `ca.key` from a directory made by [`Ca::write`].
    pub fn load(directory: &Path) -> Result<Self, PkiError> {
        Self::from_pem(&read(&directory.join(CA_CERTIFICATE))?, &read(&directory.join(CA_KEY))?)
    }

    /// Writes `ca.pem` and `ca.key`. Makes the directory (0700) when it is missing.
    pub fn write(&self, directory: &Path, replace: bool) -> Result<(), PkiError> {
        let files = [
            (&directory.join(CA_CERTIFICATE), &self.certificate, 0o644),
            (&directory.join(CA_KEY), &self.issuer.key().serialize_pem(), 0o600),
        ];
        write_pair(files, replace)
    }

    /// The authority's certificate, PEM: what every member trusts.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Makes a certificate for both ends of mTLS. A controller's always carries [`CONTROLLER_NAME`] and `localhost`;
    /// it ends with the authority at the latest.
    pub fn issue(
        &self,
        identity: &Identity,
        dns: &[String],
        ips: &[IpAddr],
        validity: Duration,
    ) -> Result<CertificateAndKey, PkiError> {
        if !is_name(identity.name()) {
            return Err(PkiError::Name(identity.name().to_owned()));
        }
        let now = OffsetDateTime::now_utc();
        if self.not_after <= now {
            return Err(PkiError::AuthorityExpired(self.not_after.date().to_string()));
        }
        let end = time::Duration::try_from(validity)
            .ok()
            .filter(|validity| validity.is_positive())
            .and_then(|validity| now.checked_add(validity))
            .ok_or(PkiError::Validity(validity))?;

        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(identity.name());
        params.subject_alt_names = subject_alt_names(identity, dns, ips)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = now - BACKDATED;
        params.not_after = end.min(self.not_after);
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(CertificateAndKey { certificate, key: key.serialize_pem() })
    }
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn subject_alt_names(identity: &Identity, dns: &[String], ips: &[IpAddr]) -> Result<Vec<SanType>, PkiError> {
    let own: &[&str] = match identity {
        Identity::Controller(_) => &[CONTROLLER_NAME, "localhost"],
        _ => &[],
    };
    let mut names = vec![SanType::URI(identity.to_string().try_into()?)];
    for name in own.iter().copied().chain(dns.iter().map(String::as_str).filter(|name| !own.contains(name))) {
        if !is_dns_name(name) {
            return Err(PkiError::DnsName(name.to_owned()));
        }
        names.push(SanType::DnsName(name.try_into()?));
    }
    names.extend(ips.iter().copied().map(SanType::IpAddress));
    Ok(names)
}

/// Letters, digits and hyphens in labels of 1 to 63; the first label may be a wildcard.
fn is_dns_name(name: &str) -> bool {
    let labels = name.strip_prefix("*.").unwrap_or(name);
    name.len() <= 253
        && labels.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        })
}

/// What a certificate says about itself; nothing here is verified.
#[derive(Debug)]
pub struct Facts {
    /// The identity URI, when there is one of ours.
    pub identity: Option<Identity>,
    /// End of its life.
    pub not_after: OffsetDateTime,
    /// Serial number, big-endian without leading zeros.
    pub serial: Vec<u8>,
    is_ca: bool,
    public_key: Vec<u8>,
}

impl Facts {
    /// Reads the first certificate of a PEM text.
    pub fn from_pem(certificate: &str) -> Result<Self, PkiError> {
        let unreadable = |reason: String| PkiError::Pem { what: "certificate", reason };
        let (_, pem) =
            x509_parser::pem::parse_x509_pem(certificate.as_bytes()).map_err(|e| unreadable(e.to_string()))?;
        let (_, parsed) = X509Certificate::from_der(&pem.contents).map_err(|e| unreadable(e.to_string()))?;
        let names = parsed.subject_alternative_name().ok().flatten();
        let identity = names.iter().flat_map(|names| &names.value.general_names).find_map(|name| match name {
            GeneralName::URI(uri) => Identity::from_uri(uri),
            _ => None,
        });
        Ok(Self {
            identity,
            not_after: parsed.validity().not_after.to_datetime(),
            serial: parsed.raw_serial().iter().copied().skip_while(|byte| *byte == 0).collect(),
            is_ca: parsed.is_ca(),
            public_key: parsed.public_key().subject_public_key.data.to_vec(),
        })
    }
}

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| PkiError::Io { action: "read", path: path.into(), source })
}

/// Writes both files or, when one of them exists and may not be replaced, neither.
fn write_pair(files: [(&PathBuf, &String, u32); 2], replace: bool) -> Result<(), PkiError> {
    for (path, ..) in files {
        if !replace && path.symlink_metadata().is_ok() {
            return Err(PkiError::Exists(path.clone()));
        }
        if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
            made.map_err(|source| PkiError::Io { action: "create", path: directory.into(), source })?;
        }
    }
    for (path, text, mode) in files {
        files::write_whole(path, text, mode).map_err(|source| PkiError::Io {
            action: "write",
            path: path.clone(),
            source,
        })?;
    }
    Ok(())
}
