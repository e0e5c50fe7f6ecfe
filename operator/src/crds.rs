//! The CRDs as YAML: generated from the types of `slackwater-api`, checked in under `charts/slackwater/crds`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use slackwater_api::{AssignedVM, MigrationNode, VMMigration};

/// Tells a person who is about to edit a file where it comes from.
const HEADER: &str = "# Generated from operator/api by `make generate`. Do not edit.\n";

/// Why the CRDs cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum CrdError {
    /// A CRD cannot be written as YAML.
    #[error("writing the CRD {name} as YAML failed")]
    Serialize {
        /// The name of the CRD.
        name: String,
        /// Why.
        source: serde_saphyr::ser::Error,
    },
    /// A file cannot be written.
    #[error("writing {path} failed")]
    WriteFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// All CRDs, by the name of the file that each belongs to.
///
/// # Errors
/// [`CrdError::Serialize`]
pub fn files() -> Result<Vec<(String, String)>, CrdError> {
    [VMMigration::crd(), AssignedVM::crd(), MigrationNode::crd()]
        .into_iter()
        .map(|crd| {
            let name = format!("{}.yaml", crd.spec.names.plural);
            to_yaml(&crd).map(|yaml| (name, format!("{HEADER}{yaml}")))
        })
        .collect()
}

fn to_yaml(crd: &CustomResourceDefinition) -> Result<String, CrdError> {
    let failed = |source| CrdError::Serialize { name: crd.metadata.name.clone().unwrap_or_default(), source };
    serde_saphyr::to_string(crd).map_err(failed)
}

/// Writes every CRD into a file of its own.
///
/// # Errors
/// [`CrdError`]; files before the one that failed have been written.
pub fn write(folder: &Path) -> Result<Vec<PathBuf>, CrdError> {
    let mut written = Vec::new();
    for (name, yaml) in files()? {
        let path = folder.join(name);
        fs::write(&path, yaml).map_err(|source| CrdError::WriteFile { path: path.clone(), source })?;
        written.push(path);
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checked_in_crds_match_the_types() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/slackwater/crds");
        let generated = files().unwrap();
        for (name, yaml) in &generated {
            let checked_in = fs::read_to_string(folder.join(name)).unwrap_or_default();
            assert!(checked_in == *yaml, "charts/slackwater/crds/{name} is stale: run `make generate`");
        }
        let count = fs::read_dir(&folder).unwrap().count();
        assert_eq!(count, generated.len(), "charts/slackwater/crds holds a file that belongs to no type");
    }

    #[test]
    fn no_field_is_unsigned_since_api_servers_do_not_know_these_formats() {
        for (name, yaml) in files().unwrap() {
            assert!(!yaml.contains("format: uint"), "{name}");
        }
    }
}
