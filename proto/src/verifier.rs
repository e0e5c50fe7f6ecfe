//! What a server must show: a certificate of our CA, with the node's name, in the role of that node's agent.
//!
//! The DNS name alone would not do: an operator's certificate, or that of another node, may carry it as well
//! (a wildcard, a copied request).

use std::sync::Arc;

use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::{
    CertificateError, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme,
};

use crate::identity::Role;

/// A certificate that is good, but not for this role. The message is for a person.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct WrongRole(String);

/// Accepts the agent of one node and no other server.
#[derive(Debug)]
pub(crate) struct AgentVerifier {
    webpki: Arc<WebPkiServerVerifier>,
    agent: Role,
}

impl AgentVerifier {
    /// Trusts what `roots` have issued, if it is for the agent of `node`.
    pub(crate) fn new(
        roots: Arc<RootCertStore>,
        provider: Arc<CryptoProvider>,
        node: &str,
    ) -> Result<Self, Error> {
        let webpki = WebPkiServerVerifier::builder_with_provider(roots, provider)
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        Ok(Self { webpki, agent: Role::Agent { node: node.to_owned() } })
    }
}

/// Whether a certificate is for `wanted`, and no other role.
fn check_role(certificate: &[u8], wanted: &Role) -> Result<(), WrongRole> {
    match Role::from_certificate(certificate) {
        Ok(role) if role == *wanted => Ok(()),
        Ok(other) => Err(WrongRole(format!("its certificate is for {other}"))),
        Err(error) => Err(WrongRole(error.to_string())),
    }
}

impl ServerCertVerifier for AgentVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified =
            self.webpki.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        check_role(end_entity, &self.agent).map_err(|wrong| {
            Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(wrong))))
        })?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};

    use super::*;

    #[test]
    fn only_one_role_and_that_of_the_nodes_agent_is_accepted() {
        let agent = Role::Agent { node: "node-a".to_owned() };
        let judge = |uris: &[&str]| {
            let mut params = CertificateParams::new(vec!["node-a".to_owned()]).unwrap();
            params.subject_alt_names.extend(uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())));
            let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
            check_role(certificate.der(), &agent).map_err(|wrong| wrong.to_string())
        };
        let ours = "spiffe://slackwater.dev/agent/node-a";
        assert_eq!(judge(&[ours]), Ok(()));
        assert_eq!(judge(&[ours, "spiffe://cluster.local/ns/a/sa/b"]), Ok(()), "others' URIs do not count");
        for (uris, why) in [
            (&[][..], "the certificate names no role"),
            (&["spiffe://cluster.local/agent/node-a"], "the certificate names no role"),
            (&[ours, "spiffe://slackwater.dev/operator"], "the certificate names more than one role"),
            (&[ours, ours], "the certificate names more than one role"),
            (&["spiffe://slackwater.dev/vmm/node-a"], "`spiffe://slackwater.dev/vmm/node-a` is no role"),
            (&["spiffe://slackwater.dev/agent/NODE-A"], "`spiffe://slackwater.dev/agent/NODE-A` does not"),
            (&["spiffe://slackwater.dev/agent/"], "`spiffe://slackwater.dev/agent/` does not name a node"),
            (
                &["spiffe://slackwater.dev/agent/node-a.lab"],
                "its certificate is for the agent of node node-a",
            ),
        ] {
            let told = judge(uris).unwrap_err();
            assert!(told.starts_with(why), "{uris:?}: {told}");
        }
    }
}
