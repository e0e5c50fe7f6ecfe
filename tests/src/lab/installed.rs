//! Where things are: what `tests/setup/install` made, and the workspace's own programs.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use super::error::LabError;

/// The programs of the workspace that nodes have in `/bin`, where they are built.
const NODE_PROGRAMS: [&str; 2] = ["slackwater-node-agent", "slackwater-lab-vmm"];

/// The folder of a thing that `install` made.
pub(super) fn installed(what: &str) -> Result<PathBuf, LabError> {
    let install = Path::new(env!("CARGO_MANIFEST_DIR")).join("setup/install");
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

/// The workspace's programs for the nodes' image: the control service, which must be there, and of the others those that have
/// been built. They lie where this program lies: one profile of one target folder.
pub(super) fn node_programs() -> Result<Vec<PathBuf>, LabError> {
    let own = std::env::current_exe().map_err(LabError::io("finding this program"))?;
    let mut folder = own.parent().unwrap_or(Path::new("/")).to_owned();
    // Tests are built into a folder below the programs'.
    if folder.ends_with("deps") || folder.ends_with("examples") {
        folder.pop();
    }
    let service = folder.join("slackwater-lab-node");
    if !service.is_file() {
        return Err(LabError::NotBuilt { name: "slackwater-lab-node".into(), folder });
    }
    let others = NODE_PROGRAMS.iter().map(|name| folder.join(name)).filter(|program| program.is_file());
    Ok(std::iter::once(service).chain(others).collect())
}
