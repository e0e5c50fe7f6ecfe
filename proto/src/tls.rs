//! A certificate, its key and the CA, read from PEM files and checked before anything is connected with them.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fmt, io};

use tokio::sync::watch;
use tokio_rustls::rustls;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::{IdentityError, Role};
use crate::reload::CertificateStatus;
use crate::validity::Validity;
use crate::verifier::AgentVerifier;

/// What one end shows and whom it trusts. Clones are handles to the same, and all get what
/// [`Credentials::follow_files`] reads later.
///
/// An agent both serves and calls: if its certificate restricts its use (extended key usage), it must allow
/// server and client authentication.
#[derive(Clone)]
pub struct Credentials {
    pub(crate) shared: Arc<Shared>,
}

/// What the clones share.
pub(crate) struct Shared {
    pub(crate) files: Files,
    pub(crate) role: Role,
    pub(crate) current: watch::Sender<Arc<Material>>,
    pub(crate) status: watch::Sender<CertificateStatus>,
}

/// Where credentials come from.
#[derive(Debug)]
pub(crate) struct Files {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) ca: PathBuf,
}

/// The files' content at one time.
#[derive(Hash)]
pub(crate) struct Raw {
    certificate: Vec<u8>,
    key: Vec<u8>,
    ca: Vec<u8>,
}

/// What was read at one time, ready for use.
pub(crate) struct Material {
    own: Arc<CertifiedKey>,
    trusted: Arc<RootCertStore>,
    role: Role,
    /// For every connection that is accepted: TLS 1.3, demands a certificate that our CA issued.
    pub(crate) server: Arc<ServerConfig>,
    /// That of the own chain.
    pub(crate) validity: Validity,
    /// The CAs that are trusted, in DER.
    pub(crate) roots: BTreeSet<Vec<u8>>,
    /// Of the files' content.
    pub(crate) fingerprint: u64,
}

/// Why credentials cannot be used. Names the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialsError {
    /// The file is missing or may not be read.
    #[error("cannot read the {what} {path}")]
    Read {
        /// `certificate`, `key` or `CA certificate`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file holds something else.
    #[error("the {what} {path} is not usable: {reason}")]
    Parse {
        /// `certificate`, `key` or `CA certificate`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Two halves of different pairs.
    #[error("the key {key} does not belong to the certificate {certificate}")]
    KeyMismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// Not valid yet, or not any more.
    #[error("the {what} {path} is valid from {from} to {to}, and not now")]
    NotValidNow {
        /// `certificate` or `CA certificate`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Begin, for a person.
        from: String,
        /// End, for a person.
        to: String,
    },
    /// The certificate is for somebody else.
    #[error("the certificate {path} is for {is}, and this is {wanted}")]
    OtherRole {
        /// The file.
        path: PathBuf,
        /// Whose certificate it is.
        is: Role,
        /// Whose it should be.
        wanted: Role,
    },
    /// The certificate names no role of Slackwater.
    #[error("the certificate {path} is not usable: {source}")]
    Role {
        /// The file.
        path: PathBuf,
        /// Why.
        source: IdentityError,
    },
}

const CERTIFICATE: &str = "certificate";
const KEY: &str = "key";
const CA: &str = "CA certificate";

impl Credentials {
    /// Reads PEM files: the certificate (with its intermediates behind it), its private key, and the CA's
    /// certificates.
    ///
    /// # Errors
    /// If a file cannot be read or holds something else, the key belongs to another certificate, a
    /// certificate is not valid now, or the certificate names no role.
    pub fn read(certificate: &Path, key: &Path, ca: &Path) -> Result<Self, CredentialsError> {
        Self::open(None, certificate, key, ca)
    }

    /// As [`Credentials::read`], for a program that has this role and no other.
    ///
    /// # Errors
    /// As [`Credentials::read`], and if the certificate is for another role.
    pub fn read_for(
        wanted: &Role,
        certificate: &Path,
        key: &Path,
        ca: &Path,
    ) -> Result<Self, CredentialsError> {
        Self::open(Some(wanted), certificate, key, ca)
    }

    fn open(
        wanted: Option<&Role>,
        certificate: &Path,
        key: &Path,
        ca: &Path,
    ) -> Result<Self, CredentialsError> {
        let files = Files { certificate: certificate.to_owned(), key: key.to_owned(), ca: ca.to_owned() };
        let material = Material::load(&files, &files.read()?, wanted)?;
        let (role, status) = (material.role.clone(), CertificateStatus::of(&material));
        let (current, status) = (watch::Sender::new(Arc::new(material)), watch::Sender::new(status));
        Ok(Self { shared: Arc::new(Shared { files, role, current, status }) })
    }

    /// The role that the certificate names. It stays the same: a file that names another one is refused.
    pub fn role(&self) -> &Role {
        &self.shared.role
    }

    /// What is in force now.
    pub(crate) fn current(&self) -> Arc<Material> {
        Arc::clone(&self.shared.current.borrow())
    }
}

impl Files {
    pub(crate) fn read(&self) -> Result<Raw, CredentialsError> {
        Ok(Raw {
            certificate: read(CERTIFICATE, &self.certificate)?,
            key: read(KEY, &self.key)?,
            ca: read(CA, &self.ca)?,
        })
    }
}

impl Raw {
    pub(crate) fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

impl Material {
    /// Checks the content of `files`. A certificate for another role than `wanted` is refused.
    pub(crate) fn load(files: &Files, raw: &Raw, wanted: Option<&Role>) -> Result<Self, CredentialsError> {
        let parse = |what, path: &Path, reason: String| CredentialsError::Parse {
            what,
            path: path.to_owned(),
            reason,
        };
        let chain = certificates(CERTIFICATE, &files.certificate, &raw.certificate)?;
        let roots = certificates(CA, &files.ca, &raw.ca)?;
        let der = PrivateKeyDer::from_pem_slice(&raw.key).map_err(|error| match error {
            pem::Error::NoItemsFound => parse(KEY, &files.key, "it holds no private key in PEM".to_owned()),
            error => parse(KEY, &files.key, error.to_string()),
        })?;
        let role = chain.first().map_or(Err(IdentityError::NoRole), |leaf| Role::from_certificate(leaf));
        let role =
            role.map_err(|source| CredentialsError::Role { path: files.certificate.clone(), source })?;
        if let Some(wanted) = wanted.filter(|wanted| **wanted != role) {
            let (path, wanted) = (files.certificate.clone(), wanted.clone());
            return Err(CredentialsError::OtherRole { path, is: role, wanted });
        }
        let validity = Validity::of_chain(&chain).ok_or_else(|| {
            parse(CERTIFICATE, &files.certificate, "its validity cannot be read".to_owned())
        })?;
        let own = CertifiedKey::from_der(chain, der, &provider()).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => CredentialsError::KeyMismatch {
                key: files.key.clone(),
                certificate: files.certificate.clone(),
            },
            error => parse(KEY, &files.key, error.to_string()),
        })?;
        let own = Arc::new(own);

        let unusable = |error: rustls::Error| parse(CA, &files.ca, error.to_string());
        let mut trusted = RootCertStore::empty();
        for root in &roots {
            trusted.add(root.clone()).map_err(unusable)?;
        }
        let trusted = Arc::new(trusted);
        let server = Arc::new(server(&own, &trusted).map_err(unusable)?);
        let roots = roots.iter().map(|root| root.to_vec()).collect();
        Ok(Self { own, trusted, role, server, validity, roots, fingerprint: raw.fingerprint() })
    }

    /// For a caller: TLS 1.3, shows our certificate, accepts only the agent of `node`, certified by our CA.
    pub(crate) fn client(&self, node: &str) -> Result<ClientConfig, rustls::Error> {
        let verifier = AgentVerifier::new(Arc::clone(&self.trusted), provider(), node)?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(Arc::clone(&self.own))));
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        // A resumed session would skip the judgement of the certificate.
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

fn server(own: &Arc<CertifiedKey>, trusted: &Arc<RootCertStore>) -> Result<ServerConfig, rustls::Error> {
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(trusted), provider())
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(Arc::clone(own))));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

/// HTTP/2 over TLS, as RFC 9113 section 3.2 names it.
const ALPN_H2: &[u8] = b"h2";

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("role", &self.shared.role).finish_non_exhaustive()
    }
}

/// Named here rather than installed for the process: a library does not choose for the whole program.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, CredentialsError> {
    std::fs::read(path).map_err(|source| CredentialsError::Read { what, path: path.to_owned(), source })
}

/// All certificates of a file: at least one, each readable and valid now.
fn certificates(
    what: &'static str,
    path: &Path,
    text: &[u8],
) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let parse = |reason: String| CredentialsError::Parse { what, path: path.to_owned(), reason };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(text)
        .collect::<Result<_, _>>()
        .map_err(|error| parse(error.to_string()))?;
    if chain.is_empty() {
        return Err(parse("it holds no certificate in PEM".to_owned()));
    }
    for der in &chain {
        let (_, certificate) = X509Certificate::from_der(der).map_err(|error| parse(error.to_string()))?;
        let validity = certificate.validity();
        if !validity.is_valid() {
            let (from, to) = (validity.not_before.to_string(), validity.not_after.to_string());
            return Err(CredentialsError::NotValidNow { what, path: path.to_owned(), from, to });
        }
    }
    Ok(chain)
}
