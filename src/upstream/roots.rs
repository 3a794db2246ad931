//! Which certificate authorities are believed: the system's, and those of a file beside them.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{ClientConfig, RootCertStore, pki_types::CertificateDer, pki_types::pem::PemObject};

/// The authorities that were found.
#[derive(Debug)]
pub struct Roots {
    store: RootCertStore,
    problems: Vec<String>,
}

/// A file of certificates that is no use.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {cause}")]
pub struct CaFileError {
    path: PathBuf,
    cause: String,
}

impl Roots {
    /// Reads the system's, and those of the PEM file `ca_file`.
    ///
    /// # Errors
    /// A `ca_file` that can't be read or holds no certificate. What is wrong with the system's is in
    /// [`problems`](Roots::problems).
    pub fn load(ca_file: Option<&Path>) -> Result<Roots, CaFileError> {
        let mut store = RootCertStore::empty();
        let system = rustls_native_certs::load_native_certs();
        store.add_parsable_certificates(system.certs);
        if let Some(path) = ca_file {
            add_file(&mut store, path).map_err(|cause| CaFileError { path: path.to_owned(), cause })?;
        }
        Ok(Roots { store, problems: system.errors.iter().map(ToString::to_string).collect() })
    }

    /// How many there are; without any, every https connection fails.
    pub fn count(&self) -> usize {
        self.store.len()
    }

    /// Which of the system's could not be read.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// TLS for a client that believes these authorities.
    pub fn into_client_config(self) -> Result<ClientConfig, rustls::Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        Ok(builder.with_root_certificates(self.store).with_no_client_auth())
    }
}

fn add_file(store: &mut RootCertStore, path: &Path) -> Result<(), String> {
    let pem = fs::read(path).map_err(|cause| cause.to_string())?;
    let certificates = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|cause| format!("not a PEM file of certificates: {cause}"))?;
    if certificates.is_empty() {
        return Err("holds no certificate (-----BEGIN CERTIFICATE-----)".to_owned());
    }
    certificates.into_iter().try_for_each(|certificate| store.add(certificate)).map_err(|e| e.to_string())
}
