//! Why a TLS handshake failed, as a message. Pure.
//!
//! rustls says what went wrong in the words of the protocol; a person wants to know which of the two
//! certificates is wrong and how. `ours` and `theirs` below are from the point of view of the end that
//! reports.

use std::error::Error;

use tokio_rustls::rustls::{self, AlertDescription, CertificateError};

use crate::verifier::WrongRole;

/// What a failed handshake means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The other end did not accept our certificate.
    Ours(String),
    /// We do not accept the other end's certificate.
    Theirs(String),
    /// Their certificate is good, but for other names than the one that was called.
    WrongName(Vec<String>),
    /// Their certificate is good, but not for the role that was called.
    WrongRole(String),
    /// Something else than a certificate.
    Protocol(String),
}

/// Finds the TLS error in an error's chain of sources, if there is one.
pub(crate) fn find<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return Some(tls);
        }
        // io::Error::source() skips the error that it wraps and goes on with that one's source.
        let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = match wrapped {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// Explains a TLS error.
pub(crate) fn refusal(error: &rustls::Error) -> Refusal {
    use rustls::Error as E;
    match error {
        E::NoCertificatesPresented => Refusal::Theirs("it showed no certificate".to_owned()),
        E::InvalidCertificate(CertificateError::NotValidForNameContext { presented, .. }) => {
            Refusal::WrongName(dns_names(presented))
        }
        E::InvalidCertificate(CertificateError::NotValidForName) => Refusal::WrongName(Vec::new()),
        E::InvalidCertificate(CertificateError::Other(other)) if other.0.is::<WrongRole>() => {
            Refusal::WrongRole(other.0.to_string())
        }
        E::InvalidCertificate(reason) => Refusal::Theirs(certificate(reason)),
        E::AlertReceived(alert) => match alert {
            AlertDescription::CertificateRequired => {
                Refusal::Ours("it demands a certificate and was shown none".to_owned())
            }
            // DecryptError: a CA of the same name is trusted there, but its key did not sign this (RFC 8446
            // section 6.2).
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                Refusal::Ours("it was issued by a CA that is not trusted there".to_owned())
            }
            AlertDescription::CertificateExpired => {
                Refusal::Ours("it is not valid at this time, by the clock there".to_owned())
            }
            AlertDescription::CertificateRevoked => Refusal::Ours("it has been revoked".to_owned()),
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::AccessDenied => Refusal::Ours(format!("TLS alert {alert:?}")),
            other => Refusal::Protocol(format!(
                "the other end broke the handshake off with the TLS alert {other:?}"
            )),
        },
        E::InvalidMessage(_) => Refusal::Protocol("the other end does not speak TLS".to_owned()),
        other => Refusal::Protocol(other.to_string()),
    }
}

/// The DNS names and IP addresses among the names that rustls lists, which come as `DnsName("node-a")` and
/// the like.
fn dns_names(presented: &[String]) -> Vec<String> {
    let host = |name: &String| {
        let inner = name.strip_prefix("DnsName(").or_else(|| name.strip_prefix("IpAddress("))?;
        Some(inner.strip_suffix(')')?.trim_matches('"').to_owned())
    };
    presented.iter().filter_map(host).collect()
}

fn certificate(error: &CertificateError) -> String {
    match error {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "it was issued by a CA that is not trusted here".to_owned()
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "it has expired".to_owned(),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "it is not valid yet".to_owned()
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "its extended key usage does not allow this use (an agent's needs server and client \
             authentication)"
                .to_owned()
        }
        other => other.to_string(),
    }
}
