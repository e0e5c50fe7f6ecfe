//! Where to find what `tests/setup/install` installed, and the workspace's own programs.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::error::LabError;

/// The programs of the workspace that nodes have in `/bin`, where they are built.
const NODE_PROGRAMS: [&str; 2] = ["slackwater-node-agent", "slackwater-reference-vmm"];

/// The folder of something that `install` provides.
pub(crate) fn installed(what: &str) -> Result<PathBuf, LabError> {
    let install = Path::new(env!("CARGO_MANIFEST_DIR")).join("../setup/install");
    let output = Command::new(&install)
        .args(["--where", what])
        .output()
        .map_err(LabError::io(format!("running {}", install.display())))?;
    let folder = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    if folder.join(".finished").exists() {
        Ok(folder)
    } else {
        Err(LabError::NotInstalled { what: what.to_owned() })
    }
}

/// Where a program of the workspace has been built: beside this one, or a folder above it, where this is a
/// test. So it is from the same profile and target folder.
///
/// # Errors
/// When it is not built.
pub fn workspace_program(name: &str) -> Result<PathBuf, LabError> {
    let own = std::env::current_exe().map_err(LabError::io("finding this program"))?;
    let folder = own.parent().unwrap_or(Path::new("/")).to_owned();
    let candidates = [folder.join(name), folder.join("..").join(name)];
    let found = candidates.into_iter().find(|path| path.is_file());
    found.ok_or_else(|| LabError::NotBuilt { name: name.to_owned(), folder })
}

/// The workspace's programs for the nodes' image: the control service, which must be there, and those of the
/// others that have been built.
pub(crate) fn node_programs() -> Result<Vec<PathBuf>, LabError> {
    let service = workspace_program("slackwater-lab-node")?;
    let others = NODE_PROGRAMS.iter().filter_map(|name| workspace_program(name).ok());
    Ok(std::iter::once(service).chain(others).collect())
}
