//! Certificates for the lab: a certificate authority (CA), and what it issues.

use std::{
    fs,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use std::io::Write;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

use crate::error::LabError;

/// A certificate authority.
#[derive(Debug)]
pub struct Pki {
    issuer: Issuer<'static, KeyPair>,
    ca_pem: String,
}

/// A certificate with its key, as PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// The certificate.
    pub certificate_pem: String,
    /// The private key.
    pub key_pem: String,
}

/// The content of a certificate. [`Subject::agent`] and [`Subject::operator`] are correct ones; tests build
/// wrong ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// Common name.
    pub common_name: String,
    /// Organisation: Kubernetes reads it as a group.
    pub organisation: Option<String>,
    /// DNS names and addresses among the alternative names.
    pub names: Vec<String>,
    /// URIs among the alternative names.
    pub uris: Vec<String>,
    /// Whether a TLS server may use it.
    pub server: bool,
    /// Whether a TLS client may use it.
    pub client: bool,
}

impl Subject {
    /// The agent of a node: server and client, named by DNS as the node and by URI in its role.
    #[must_use]
    pub fn agent(node: &str) -> Self {
        Self {
            common_name: node.to_owned(),
            names: vec![node.to_owned()],
            uris: vec![format!("spiffe://slackwater.dev/agent/{node}")],
            server: true,
            client: true,
            ..Self::default()
        }
    }

    /// The operator: a client.
    #[must_use]
    pub fn operator() -> Self {
        Self {
            common_name: "slackwater-operator".to_owned(),
            uris: vec!["spiffe://slackwater.dev/operator".to_owned()],
            client: true,
            ..Self::default()
        }
    }
}

impl Pki {
    /// A new authority with this name.
    ///
    /// # Errors
    /// When no key or certificate can be made.
    pub fn new(name: &str) -> Result<Self, LabError> {
        let failed = |source| LabError::Certificate { subject: name.to_owned(), source };
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().map_err(failed)?;
        let ca_pem = params.self_signed(&key).map_err(failed)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), ca_pem })
    }

    /// The authority's own certificate.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// A certificate for the agent of a node.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn agent(&self, node: &str) -> Result<Issued, LabError> {
        self.issue(&Subject::agent(node))
    }

    /// A certificate for the operator.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn operator(&self) -> Result<Issued, LabError> {
        self.issue(&Subject::operator())
    }

    /// A certificate for this subject.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn issue(&self, subject: &Subject) -> Result<Issued, LabError> {
        let failed = |source| LabError::Certificate { subject: subject.common_name.clone(), source };
        let mut params = CertificateParams::new(subject.names.clone()).map_err(failed)?;
        params.distinguished_name.push(DnType::CommonName, subject.common_name.clone());
        if let Some(organisation) = &subject.organisation {
            params.distinguished_name.push(DnType::OrganizationName, organisation.clone());
        }
        for uri in &subject.uris {
            params.subject_alt_names.push(SanType::URI(uri.as_str().try_into().map_err(failed)?));
        }
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        if subject.server {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        if subject.client {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok(Issued { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    /// Writes the authority's certificate to `FOLDER/ca.crt`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_ca(&self, folder: &Path) -> Result<PathBuf, LabError> {
        let path = folder.join("ca.crt");
        fs::write(&path, &self.ca_pem).map_err(LabError::io(format!("writing {}", path.display())))?;
        Ok(path)
    }
}

impl Issued {
    /// Writes `FOLDER/NAME.crt`, and `FOLDER/NAME.key` for its owner only, and returns the two paths.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn write(&self, folder: &Path, name: &str) -> Result<(PathBuf, PathBuf), LabError> {
        let (certificate, key) = (folder.join(format!("{name}.crt")), folder.join(format!("{name}.key")));
        fs::write(&certificate, &self.certificate_pem)
            .map_err(LabError::io(format!("writing {}", certificate.display())))?;
        write_secret(&key, &self.key_pem)?;
        Ok((certificate, key))
    }
}

/// Writes a file that only its owner may read.
pub(crate) fn write_secret(path: &Path, content: &str) -> Result<(), LabError> {
    let write = || {
        let mut file = fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(path)?;
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        file.write_all(content.as_bytes())
    };
    write().map_err(LabError::io(format!("writing {}", path.display())))
}

#[cfg(test)]
mod tests {
    use x509_parser::{extensions::GeneralName, pem::parse_x509_pem};

    use super::*;

    fn names(issued: &Issued) -> Vec<String> {
        let (_, pem) = parse_x509_pem(issued.certificate_pem.as_bytes()).unwrap();
        let certificate = pem.parse_x509().unwrap();
        let names = &certificate.subject_alternative_name().unwrap().unwrap().value.general_names;
        names
            .iter()
            .map(|name| match name {
                GeneralName::DNSName(name) => format!("DNS {name}"),
                GeneralName::URI(name) => format!("URI {name}"),
                other => format!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn an_agents_certificate_names_its_node_twice_and_the_operators_only_its_role() {
        let pki = Pki::new("test").unwrap();
        let agent = pki.agent("node-a").unwrap();
        assert_eq!(names(&agent), ["DNS node-a", "URI spiffe://slackwater.dev/agent/node-a"]);
        assert_eq!(names(&pki.operator().unwrap()), ["URI spiffe://slackwater.dev/operator"]);
    }

    #[test]
    fn a_certificate_is_signed_by_its_own_authority_and_by_no_other() {
        let (ours, other) = (Pki::new("ours").unwrap(), Pki::new("ours").unwrap());
        let issued = ours.agent("node-a").unwrap();
        let (_, leaf) = parse_x509_pem(issued.certificate_pem.as_bytes()).unwrap();
        let signed_by = |pki: &Pki| {
            let (_, ca) = parse_x509_pem(pki.ca_pem().as_bytes()).unwrap();
            leaf.parse_x509().unwrap().verify_signature(Some(ca.parse_x509().unwrap().public_key())).is_ok()
        };
        assert!(signed_by(&ours));
        assert!(!signed_by(&other));
    }
}
