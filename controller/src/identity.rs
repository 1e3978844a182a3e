//! Who a peer is: the URI SAN of its certificate, and what its role may do.

use std::fmt;

use tonic::{Request, Status};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// What a certificate entitles to. Viewer, operator and admin are ordered; relay and controller stand apart.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Role {
    /// A relay: `Fleet`, for its own node id.
    Relay,
    /// A controller replica.
    Controller,
    /// Reads.
    Viewer,
    /// Reads, revokes, mints.
    Operator,
    /// Everything an operator may, and what changes the cluster.
    Admin,
}

impl Role {
    /// Whether this role may do what `needed` may.
    pub fn covers(self, needed: Role) -> bool {
        match (self.rank(), needed.rank()) {
            (Some(own), Some(needed)) => own >= needed,
            _ => self == needed,
        }
    }

    fn rank(self) -> Option<u8> {
        match self {
            Role::Viewer => Some(0),
            Role::Operator => Some(1),
            Role::Admin => Some(2),
            Role::Relay | Role::Controller => None,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Relay => "relay",
            Role::Controller => "controller",
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Admin => "admin",
        })
    }
}

/// The name a certificate was issued to: `turnpike://<role>/<name>`.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Identity {
    /// What it may do.
    pub role: Role,
    /// Node id, controller id or person; see [`is_name`].
    pub name: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.role, self.name)
    }
}

/// Why a certificate names nobody here.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// Not X.509.
    #[error("the certificate cannot be read")]
    Certificate,
    /// No `turnpike://` URI in its subject alternative names.
    #[error("the certificate carries no turnpike:// identity")]
    Absent,
    /// Several identities, an unknown role or a name outside the alphabet.
    #[error("the certificate's turnpike:// identity is not of the form turnpike://<role>/<name>")]
    Malformed,
}

/// Whether `name` can be a node id: 1..=63 of `A-Z a-z 0-9 . _ -`, beginning with a letter or digit. It becomes a
/// part of store keys and a metric label, so nothing else gets in.
pub fn is_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

impl Identity {
    /// Reads the identity from a DER certificate whose chain the TLS layer has already verified.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub fn from_der(certificate: &[u8]) -> Result<Self, IdentityError> {
        let (_, certificate) = X509Certificate::from_der(certificate).map_err(|_| IdentityError::Certificate)?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|_| IdentityError::Certificate)?
            .ok_or(IdentityError::Absent)?;
        let mut uris = names.value.general_names.iter().filter_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix("turnpike://"),
            _ => None,
        });
        let identity = uris.next().ok_or(IdentityError::Absent)?;
        if uris.next().is_some() {
            return Err(IdentityError::Malformed);
        }
        Self::from_path(identity).ok_or(IdentityError::Malformed)
    }

    fn from_path(path: &str) -> Option<Self> {
        let (role, name) = path.split_once('/')?;
        let role = match role {
            "relay" => Role::Relay,
            "controller" => Role::Controller,
            "viewer" => Role::Viewer,
            "operator" => Role::Operator,
            "admin" => Role::Admin,
            _ => return None,
        };
        is_name(name).then(|| Self { role, name: name.to_owned() })
    }

    /// The caller of a request: what an outer layer has put into its extensions, else its TLS client certificate.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` if there is no certificate or it names nobody.
    pub fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        if let Some(identity) = request.extensions().get::<Self>() {
            return Ok(identity.clone());
        }
        let certificates = request
            .peer_certs()
            .ok_or_else(|| Status::unauthenticated("a client certificate of this cluster is needed"))?;
        let leaf = certificates
            .first()
            .ok_or_else(|| Status::unauthenticated("a client certificate of this cluster is needed"))?;
        Self::from_der(leaf).map_err(|error| Status::unauthenticated(error.to_string()))
    }
}

/// The caller, if its role covers `needed`.
///
/// # Errors
/// `UNAUTHENTICATED` without an identity; `PERMISSION_DENIED`, naming the role needed, with one that does not cover it.
pub fn require<T>(request: &Request<T>, needed: Role) -> Result<Identity, Status> {
    let identity = Identity::of(request)?;
    if identity.role.covers(needed) {
        return Ok(identity);
    }
    let role = identity.role;
    Err(Status::permission_denied(format!("this needs the role {needed}; yours is {role}")))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    #[test]
    fn certificates_name_their_holder() {
        let malformed = Err(IdentityError::Malformed);
        let relay = Identity { role: Role::Relay, name: "eu-1".to_owned() };
        let cases: &[(&str, &[&str], Result<Identity, IdentityError>)] = &[
            ("a relay", &["turnpike://relay/eu-1"], Ok(relay.clone())),
            ("beside a foreign URI", &["spiffe://x/y", "turnpike://relay/eu-1"], Ok(relay)),
            ("none", &[], Err(IdentityError::Absent)),
            ("foreign only", &["spiffe://x/relay/eu-1"], Err(IdentityError::Absent)),
            ("two of ours", &["turnpike://relay/eu-1", "turnpike://admin/root"], malformed.clone()),
            ("unknown role", &["turnpike://king/arthur"], malformed.clone()),
            ("no name", &["turnpike://relay/"], malformed.clone()),
            ("a path as name", &["turnpike://relay/eu-1/x"], malformed.clone()),
            ("a dot first", &["turnpike://relay/.."], malformed),
        ];
        for (what, uris, expected) in cases {
            assert_eq!(Identity::from_der(&certificate(uris)), *expected, "{what}");
        }
        assert_eq!(Identity::from_der(b"no DER"), Err(IdentityError::Certificate));
    }

    #[test]
    fn roles_cover() {
        let roles = [Role::Relay, Role::Controller, Role::Viewer, Role::Operator, Role::Admin];
        let covers = |own: Role| roles.into_iter().filter(|needed| own.covers(*needed)).collect::<Vec<_>>();
        assert_eq!(covers(Role::Relay), [Role::Relay]);
        assert_eq!(covers(Role::Controller), [Role::Controller]);
        assert_eq!(covers(Role::Viewer), [Role::Viewer]);
        assert_eq!(covers(Role::Operator), [Role::Viewer, Role::Operator]);
        assert_eq!(covers(Role::Admin), [Role::Viewer, Role::Operator, Role::Admin]);
    }

    #[test]
    fn refusals_name_the_role_needed() {
        let mut request = Request::new(());
        assert_eq!(require(&request, Role::Viewer).expect_err("nobody").code(), tonic::Code::Unauthenticated);
        request.extensions_mut().insert(Identity { role: Role::Viewer, name: "ann".to_owned() });
        assert!(require(&request, Role::Viewer).is_ok());
        let refused = require(&request, Role::Operator).expect_err("a viewer is no operator");
        assert_eq!(refused.code(), tonic::Code::PermissionDenied);
        assert!(refused.message().contains("operator"), "{}", refused.message());
    }

    fn certificate(uris: &[&str]) -> Vec<u8> {
        let mut parameters = CertificateParams::default();
        for uri in uris {
            let uri = (*uri).try_into().expect("an IA5 string");
            parameters.subject_alt_names.push(SanType::URI(uri));
        }
        let key = KeyPair::generate().expect("a key");
        parameters.self_signed(&key).expect("a certificate").der().to_vec()
    }
}
