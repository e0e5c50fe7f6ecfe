//! Who the caller is: the role that a certificate names, and who may call what.
//!
//! A certificate names its role by one URI in its subject alternative names (a SPIFFE ID, in the trust domain
//! `slackwater.dev`):
//!
//! | URI | role |
//! |---|---|
//! | `spiffe://slackwater.dev/operator` | the operator, or a command-line tool |
//! | `spiffe://slackwater.dev/agent/<node>` | the agent of that node; its certificate has the DNS name `<node>` |
//!
//! TLS has already proved that the caller holds the certificate's key and that our CA issued it. Here it is
//! only read.

use std::fmt;
use std::str::FromStr;

use slackwater_handover::Reason;
use tonic::{Code, Request, Status};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::refusal::Refusal;

/// What every role's URI begins with.
pub const TRUST_DOMAIN: &str = "spiffe://slackwater.dev/";

/// What the holder of a certificate is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Role {
    /// The operator, or a command-line tool in its place.
    Operator,
    /// The agent of a node.
    Agent {
        /// The node's name.
        node: String,
    },
}

/// Why a certificate names no role.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum IdentityError {
    /// Not an X.509 certificate, or one whose alternative names cannot be read.
    #[error("the certificate cannot be read: {reason}")]
    ReadCertificate {
        /// What the parser said.
        reason: String,
    },
    /// No URI of ours.
    #[error(
        "the certificate names no role: it has no URI in its alternative names that begins with {TRUST_DOMAIN}"
    )]
    NoRole,
    /// It must have one role.
    #[error("the certificate names more than one role: {}", uris.join(", "))]
    ManyRoles {
        /// All of ours.
        uris: Vec<String>,
    },
    /// A URI of ours that is no role.
    #[error("`{uri}` is no role: {TRUST_DOMAIN}operator or {TRUST_DOMAIN}agent/<node> would be one")]
    UnknownRole {
        /// The URI.
        uri: String,
    },
    /// A node name that Kubernetes would not accept.
    #[error("`{uri}` does not name a node: {NODE_NAME_RULE}")]
    NodeName {
        /// The URI.
        uri: String,
    },
}

const NODE_NAME_RULE: &str = "a node's name has 1 to 253 characters of a-z, 0-9, `-` and `.`, and begins and \
                              ends with a letter or digit";

impl Role {
    /// Reads the role from a certificate in DER.
    ///
    /// # Errors
    /// If it is no certificate, or has no, more than one, or an unknown URI of ours. URIs of others are
    /// passed over.
    pub fn from_certificate(der: &[u8]) -> Result<Self, IdentityError> {
        let unreadable = |reason: String| IdentityError::ReadCertificate { reason };
        let (_, certificate) =
            X509Certificate::from_der(der).map_err(|error| unreadable(error.to_string()))?;
        let names = certificate.subject_alternative_name().map_err(|error| unreadable(error.to_string()))?;
        let uris: Vec<&str> = names
            .iter()
            .flat_map(|extension| &extension.value.general_names)
            .filter_map(|name| match name {
                GeneralName::URI(uri) if uri.starts_with(TRUST_DOMAIN) => Some(*uri),
                _ => None,
            })
            .collect();
        match uris.as_slice() {
            [] => Err(IdentityError::NoRole),
            [uri] => uri.parse(),
            many => Err(IdentityError::ManyRoles { uris: many.iter().map(ToString::to_string).collect() }),
        }
    }

    /// The URI that names this role.
    pub fn uri(&self) -> String {
        match self {
            Self::Operator => format!("{TRUST_DOMAIN}operator"),
            Self::Agent { node } => format!("{TRUST_DOMAIN}agent/{node}"),
        }
    }
}

impl FromStr for Role {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        let path = uri.strip_prefix(TRUST_DOMAIN).unwrap_or_default();
        match path.split_once('/') {
            None if path == "operator" => Ok(Self::Operator),
            Some(("agent", node)) if is_node_name(node) => Ok(Self::Agent { node: node.to_owned() }),
            Some(("agent", _)) => Err(IdentityError::NodeName { uri: uri.to_owned() }),
            _ => Err(IdentityError::UnknownRole { uri: uri.to_owned() }),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operator => f.write_str("the operator"),
            Self::Agent { node } => write!(f, "the agent of node {node}"),
        }
    }
}

/// Whether `name` can be a node's: a DNS subdomain as in RFC 1123, which is what Kubernetes demands.
pub fn is_node_name(name: &str) -> bool {
    let label = |label: &str| {
        let edge = |byte: Option<u8>| byte.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let inside = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        label.len() <= 63
            && label.bytes().all(inside)
            && edge(label.bytes().next())
            && edge(label.bytes().next_back())
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// The role of the caller.
///
/// # Errors
/// UNAUTHENTICATED if the call came without a certificate (over something else than TLS), or its certificate
/// names no role.
pub fn caller<T>(request: &Request<T>) -> Result<Role, Status> {
    let certificates = request.peer_certs();
    let Some(leaf) = certificates.as_ref().and_then(|chain| chain.first()) else {
        return Err(unauthenticated("the caller showed no certificate: this service needs mutual TLS"));
    };
    Role::from_certificate(leaf).map_err(|error| unauthenticated(&error.to_string()))
}

fn unauthenticated(message: &str) -> Status {
    Refusal::new(Code::Unauthenticated, Reason::Other("CallerUnauthenticated".into()), message).into()
}

/// Lets only the operator through.
///
/// # Errors
/// As [`caller`], and PERMISSION_DENIED for any other role.
pub fn require_operator<T>(request: &Request<T>) -> Result<(), Status> {
    match caller(request)? {
        Role::Operator => Ok(()),
        other => Err(denied(&other, "the operator")),
    }
}

/// Lets only agents through, and gives the caller's node.
///
/// # Errors
/// As [`caller`], and PERMISSION_DENIED for any other role.
pub fn require_agent<T>(request: &Request<T>) -> Result<String, Status> {
    match caller(request)? {
        Role::Agent { node } => Ok(node),
        other => Err(denied(&other, "the agent of a node")),
    }
}

/// Lets only the agent of `node` through: the one that Reserve named as the peer. `calling` is from
/// [`require_agent`].
///
/// # Errors
/// PERMISSION_DENIED for any other node.
pub fn require_node(calling: &str, node: &str) -> Result<(), Status> {
    if calling == node {
        return Ok(());
    }
    Err(denied(&Role::Agent { node: calling.to_owned() }, &Role::Agent { node: node.to_owned() }.to_string()))
}

fn denied(called: &Role, may: &str) -> Status {
    let message = format!("called by {called}, but only {may} may do this");
    Refusal::new(Code::PermissionDenied, Reason::Other("CallerNotAllowed".into()), message).into()
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    fn certificate(uris: &[&str]) -> Vec<u8> {
        let mut params = CertificateParams::new(vec!["node-a".to_owned()]).unwrap();
        for uri in uris {
            params.subject_alt_names.push(SanType::URI((*uri).try_into().unwrap()));
        }
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn both_roles_are_read_from_the_certificate_and_written_back_as_the_same_uri() {
        for (uri, role) in [
            ("spiffe://slackwater.dev/operator", Role::Operator),
            ("spiffe://slackwater.dev/agent/node-a.lab", Role::Agent { node: "node-a.lab".to_owned() }),
        ] {
            assert_eq!(Role::from_certificate(&certificate(&[uri])), Ok(role.clone()));
            assert_eq!(role.uri(), uri);
        }
    }

    #[test]
    fn uris_of_other_trust_domains_are_passed_over() {
        let der = certificate(&["spiffe://cluster.local/ns/a/sa/b", "spiffe://slackwater.dev/operator"]);
        assert_eq!(Role::from_certificate(&der), Ok(Role::Operator));
        let der = certificate(&["spiffe://slackwater.dev.example/operator"]);
        assert_eq!(Role::from_certificate(&der), Err(IdentityError::NoRole));
    }

    #[test]
    fn a_certificate_with_two_roles_has_none() {
        let der = certificate(&["spiffe://slackwater.dev/operator", "spiffe://slackwater.dev/agent/a"]);
        let error = Role::from_certificate(&der).unwrap_err().to_string();
        assert_eq!(
            error,
            "the certificate names more than one role: spiffe://slackwater.dev/operator, \
             spiffe://slackwater.dev/agent/a"
        );
    }

    #[test]
    fn unknown_roles_and_bad_node_names_are_refused_by_name() {
        for uri in ["operator/", "Operator", "root", "agent", "", "operator/x"] {
            let uri = format!("{TRUST_DOMAIN}{uri}");
            assert_eq!(uri.parse::<Role>(), Err(IdentityError::UnknownRole { uri: uri.clone() }));
        }
        for node in ["", "Node", "a/b", "-a", "a-", "a..b", "a_b", &"a".repeat(64), &"a.".repeat(127)] {
            let uri = format!("{TRUST_DOMAIN}agent/{node}");
            assert_eq!(uri.parse::<Role>(), Err(IdentityError::NodeName { uri: uri.clone() }), "{node}");
        }
    }

    #[test]
    fn what_is_no_certificate_is_refused_in_words() {
        let error = Role::from_certificate(b"-----BEGIN").unwrap_err();
        assert!(matches!(error, IdentityError::ReadCertificate { .. }), "{error}");
    }

    #[test]
    fn a_call_without_a_certificate_is_unauthenticated() {
        let status = require_operator(&Request::new(())).unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated);
        assert_eq!(status.message(), "the caller showed no certificate: this service needs mutual TLS");
    }

    #[test]
    fn the_refusal_of_another_node_names_the_one_that_may_call() {
        assert!(require_node("node-a", "node-a").is_ok());
        let status = require_node("node-c", "node-a").unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied);
        assert_eq!(
            status.message(),
            "called by the agent of node node-c, but only the agent of node node-a may do this"
        );
    }
}
