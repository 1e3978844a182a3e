//! An authority of a test's own, and the certificates that relays and web servers show to clients.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

use crate::process::Host;

/// Name of the intermediate authority.
const INTERMEDIATE: &str = "intermediate of a test";

/// An authority with an intermediate, as public ones have: a server that does not send its chain is not trusted.
pub struct Authority {
    directory: PathBuf,
    root: Vec<u8>,
    intermediate: rcgen::Certificate,
    issuer: Issuer<'static, KeyPair>,
}

/// Files of a certificate with its chain and of its key.
#[derive(Clone, Debug)]
pub struct Pair {
    /// PEM, the server's own certificate first.
    pub certificate: PathBuf,
    /// PEM.
    pub key: PathBuf,
}

impl Pair {
    /// An entry of the relay's `certificates`.
    #[must_use]
    pub fn entry(&self) -> String {
        format!("{{ certificate = {:?}, key = {:?} }}", self.certificate, self.key)
    }

    /// DER of the server's own certificate.
    ///
    /// # Errors
    /// The file holds none.
    pub fn der(&self) -> Result<Vec<u8>> {
        Ok(CertificateDer::from_pem_file(&self.certificate)?.to_vec())
    }
}

fn authority(name: &str, path_length: u8) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

impl Authority {
    /// A new one, whose root is in `root.pem` of `directory`.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn new(directory: &Path) -> Result<Self> {
        let root_key = KeyPair::generate()?;
        let root_params = authority("root of a test", 1);
        let root = root_params.self_signed(&root_key)?;
        let root_issuer = Issuer::new(root_params, root_key);
        let key = KeyPair::generate()?;
        let params = authority(INTERMEDIATE, 0);
        let intermediate = params.signed_by(&key, &root_issuer)?;
        fs::write(directory.join("root.pem"), root.pem())?;
        Ok(Self {
            directory: directory.to_owned(),
            root: root.der().to_vec(),
            intermediate,
            issuer: Issuer::new(params, key),
        })
    }

    /// PEM file of the root.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.directory.join("root.pem")
    }

    /// A certificate for these names and addresses in `<stem>.pem` and `<stem>.key`; files that are there are replaced as
    /// a certificate robot replaces them: by renaming new ones over them.
    ///
    /// # Errors
    /// A name is none, or the directory cannot be written.
    pub fn issue(&self, stem: &str, names: &[&str], addresses: &[IpAddr]) -> Result<Pair> {
        let key = KeyPair::generate()?;
        let names: Vec<String> =
            names.iter().map(|&n| n.to_owned()).chain(addresses.iter().map(ToString::to_string)).collect();
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, stem);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let certificate = params.signed_by(&key, &self.issuer)?;
        let pair = Pair {
            certificate: self.directory.join(format!("{stem}.pem")),
            key: self.directory.join(format!("{stem}.key")),
        };
        let chain = certificate.pem() + &self.intermediate.pem();
        for (path, text) in [(&pair.key, key.serialize_pem()), (&pair.certificate, chain)] {
            let new = path.with_extension("new");
            fs::write(&new, text)?;
            fs::rename(&new, path)?;
        }
        Ok(pair)
    }

    /// What a rustls client needs to trust it.
    ///
    /// # Errors
    /// rustls does not like the root.
    pub fn tls_client(&self) -> Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(self.root.clone()))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
    }

    /// Makes `home` a home directory whose NSS database trusts it, as Chromium looks it up.
    ///
    /// # Errors
    /// `certutil` fails.
    pub async fn trust_in(&self, home: &Path) -> Result<()> {
        trust(&self.root(), home).await
    }
}

/// Makes `home` a home directory whose NSS database trusts the authority of this PEM file, as Chromium looks it up.
///
/// # Errors
/// `certutil` fails.
pub async fn trust(root: &Path, home: &Path) -> Result<()> {
    let database = home.join(".pki/nssdb");
    fs::create_dir_all(&database)?;
    let database = format!("sql:{}", database.display());
    let root = root.display().to_string();
    let make: &[&str] = &["-N", "--empty-password"];
    for arguments in [make, &["-A", "-n", "authority of a test", "-t", "C,,", "-i", &root]] {
        let mut command = Command::new("certutil");
        command.args(["-d", &database]).args(arguments);
        let output = Host::Machine.output(command).await.context("certutil (Debian's libnss3-tools)")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "certutil {arguments:?}: {said}");
    }
    Ok(())
}
