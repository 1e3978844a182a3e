//! Certificates as others see them: openssl, and rustls on both sides of a handshake.

use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use turnctl::pki::{CONTROLLER_NAME, Ca, CertificateAndKey, Facts, Identity, PkiError, create_ca};

const YEAR: Duration = Duration::from_secs(365 * 86_400);

#[test]
fn openssl_verifies_the_chain_and_shows_the_names() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let ca = create_ca("test authority")?;
    ca.write(directory.path(), false)?;
    let ip: IpAddr = "192.0.2.7".parse()?;
    let issued = ca.issue(&Identity::Controller("c1".into()), &["c1.example.org".into()], &[ip], YEAR)?;
    let (certificate, key) = issued.write(directory.path(), "controller-c1", false)?;
    assert_eq!(key.metadata()?.permissions().mode() & 0o777, 0o600);
    assert_eq!(directory.path().join("ca.key").metadata()?.permissions().mode() & 0o777, 0o600);

    for purpose in ["sslserver", "sslclient"] {
        let verified = Command::new("openssl")
            .args(["verify", "-x509_strict", "-purpose", purpose, "-CAfile"])
            .args([&directory.path().join("ca.pem"), &certificate])
            .output()?;
        ensure!(verified.status.success(), "{purpose}: {}", String::from_utf8_lossy(&verified.stderr));
    }
    let shown =
        Command::new("openssl").args(["x509", "-noout", "-ext", "subjectAltName", "-in"]).arg(&certificate).output()?;
    let shown = String::from_utf8(shown.stdout)?;
    for name in [
        "URI:turnpike://controller/c1",
        "DNS:controller.turnpike",
        "DNS:localhost",
        "DNS:c1.example.org",
        "IP Address:192.0.2.7",
    ] {
        assert!(shown.contains(name), "{name} is missing in {shown}");
    }
    Ok(())
}

#[test]
fn both_sides_of_a_handshake_accept_each_other() -> Result<()> {
    let ca = create_ca("one")?;
    let controller = ca.issue(&Identity::Controller("c1".into()), &[], &[], YEAR)?;
    let relay = ca.issue(&Identity::Relay("eu-1".into()), &[], &[], YEAR)?;
    let (seen_by_client, seen_by_server) = handshake(&ca, &controller, &ca, &relay)?;
    assert_eq!(Facts::from_pem(&controller.certificate)?.identity, Some(Identity::Controller("c1".into())));
    assert_eq!(seen_by_client, CertificateDer::from_pem_slice(controller.certificate.as_bytes())?);
    assert_eq!(seen_by_server, CertificateDer::from_pem_slice(relay.certificate.as_bytes())?);

    // A relay's certificate does not pass for a controller's, nor a stranger's for a member's.
    assert!(handshake(&ca, &relay, &ca, &relay).is_err());
    let stranger = create_ca("two")?;
    let forged = stranger.issue(&Identity::Admin("mallory".into()), &[], &[], YEAR)?;
    assert!(handshake(&ca, &controller, &ca, &forged).is_err());
    Ok(())
}

#[test]
fn an_authority_read_back_from_files_issues_under_the_same_root() -> Result<()> {
    let directory = tempfile::tempdir()?;
    create_ca("one")?.write(directory.path(), false)?;
    let ca = Ca::load(directory.path())?;
    let controller = ca.issue(&Identity::Controller("c1".into()), &[], &[], YEAR)?;
    let admin = Ca::load(directory.path())?.issue(&Identity::Admin("alice".into()), &[], &[], YEAR)?;
    handshake(&ca, &controller, &ca, &admin)?;
    Ok(())
}

#[test]
fn a_key_of_another_authority_and_a_member_as_authority_are_refused() -> Result<()> {
    let (one, two) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let ca = create_ca("one")?;
    ca.write(one.path(), false)?;
    create_ca("two")?.write(two.path(), false)?;
    let mixed = Ca::from_pem(ca.certificate(), &std::fs::read_to_string(two.path().join("ca.key"))?);
    assert!(matches!(mixed, Err(PkiError::Authority(_))));
    let member = ca.issue(&Identity::Relay("eu-1".into()), &[], &[], YEAR)?;
    assert!(matches!(Ca::from_pem(&member.certificate, &member.key), Err(PkiError::Authority(_))));
    Ok(())
}

#[test]
fn nothing_is_replaced_unasked_and_nothing_half_written() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let ca = create_ca("one")?;
    ca.write(directory.path(), false)?;
    let before = std::fs::read(directory.path().join("ca.key"))?;
    assert!(matches!(create_ca("two")?.write(directory.path(), false), Err(PkiError::Exists(_))));
    assert_eq!(std::fs::read(directory.path().join("ca.key"))?, before);

    // Only the key is in the way: the certificate beside it is not written either.
    std::fs::write(directory.path().join("relay-a.key"), "mine")?;
    let issued = ca.issue(&Identity::Relay("a".into()), &[], &[], YEAR)?;
    assert!(matches!(issued.write(directory.path(), "relay-a", false), Err(PkiError::Exists(_))));
    assert!(!directory.path().join("relay-a.pem").exists());
    issued.write(directory.path(), "relay-a", true)?;
    assert_eq!(std::fs::read_to_string(directory.path().join("relay-a.key"))?, issued.key);
    assert_eq!(directory.path().join("relay-a.key").metadata()?.permissions().mode() & 0o777, 0o600);
    Ok(())
}

#[test]
fn names_that_could_leave_the_uri_or_the_directory_are_refused() -> Result<()> {
    let ca = create_ca("one")?;
    for name in ["", "a/b", "../x", ".hidden", "a b", "a\n", "ü", &"x".repeat(64)] {
        let issued = ca.issue(&Identity::Relay(name.into()), &[], &[], YEAR);
        assert!(matches!(issued, Err(PkiError::Name(_))), "{name:?}");
        assert_eq!(Identity::from_uri(&format!("turnpike://relay/{name}")), None, "{name:?}");
    }
    for name in ["", "-a", "a..b", "a b", "a/b", "192.0.2.1:80"] {
        let issued = ca.issue(&Identity::Relay("a".into()), &[name.into()], &[], YEAR);
        assert!(matches!(issued, Err(PkiError::DnsName(_))), "{name:?}");
    }
    for validity in [Duration::ZERO, Duration::MAX] {
        assert!(matches!(ca.issue(&Identity::Relay("a".into()), &[], &[], validity), Err(PkiError::Validity(_))));
    }
    Ok(())
}

#[test]
fn a_certificate_does_not_outlive_its_authority() -> Result<()> {
    let ca = create_ca("one")?;
    let issued = ca.issue(&Identity::Relay("a".into()), &[], &[], 100 * YEAR)?;
    assert_eq!(Facts::from_pem(&issued.certificate)?.not_after, Facts::from_pem(ca.certificate())?.not_after);
    Ok(())
}

/// Runs TLS in memory, the client asking for [`CONTROLLER_NAME`]; gives the certificate each side saw.
fn handshake(
    client_trusts: &Ca,
    server: &CertificateAndKey,
    server_trusts: &Ca,
    client: &CertificateAndKey,
) -> Result<(CertificateDer<'static>, CertificateDer<'static>)> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots(server_trusts)?), provider.clone()).build()?;
    let (chain, key) = parsed(server)?;
    let server_config = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    let (chain, key) = parsed(client)?;
    let client_config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots(client_trusts)?)
        .with_client_auth_cert(chain, key)?;
    let mut client = ClientConnection::new(Arc::new(client_config), ServerName::try_from(CONTROLLER_NAME)?)?;
    let mut server = ServerConnection::new(Arc::new(server_config))?;
    let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        while client.wants_write() {
            client.write_tls(&mut to_server)?;
        }
        while !to_server.is_empty() {
            let read = server.read_tls(&mut to_server.as_slice())?;
            to_server.drain(..read);
            server.process_new_packets()?;
        }
        while server.wants_write() {
            server.write_tls(&mut to_client)?;
        }
        while !to_client.is_empty() {
            let read = client.read_tls(&mut to_client.as_slice())?;
            to_client.drain(..read);
            client.process_new_packets()?;
        }
        if !client.is_handshaking() && !server.is_handshaking() {
            let (Some([seen_by_client, ..]), Some([seen_by_server, ..])) =
                (client.peer_certificates(), server.peer_certificates())
            else {
                bail!("a side showed no certificate");
            };
            return Ok((seen_by_client.clone(), seen_by_server.clone()));
        }
    }
    bail!("the handshake does not end")
}

fn roots(ca: &Ca) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.certificate().as_bytes())?)?;
    Ok(roots)
}

fn parsed(pair: &CertificateAndKey) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    Ok((
        vec![CertificateDer::from_pem_slice(pair.certificate.as_bytes())?],
        PrivateKeyDer::from_pem_slice(pair.key.as_bytes())?,
    ))
}
