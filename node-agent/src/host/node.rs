//! The node's kernel and boot.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// The kernel of the node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// As `uname -r` prints it.
    pub release: String,
    /// Another value means that the node has been booted in between.
    pub boot_id: String,
}

/// The boot id could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the boot id from {}", path.display())]
pub struct ReadBootIdError {
    pub(crate) path: PathBuf,
    pub(crate) source: io::Error,
}

/// The running kernel. The procfs at `proc` gives the boot id.
///
/// # Errors
/// If the boot id cannot be read.
pub fn kernel(proc: &Path) -> Result<Kernel, ReadBootIdError> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    Ok(Kernel { release, boot_id: boot_id(proc)? })
}

/// The id of the node's current boot, from the procfs at `proc`.
///
/// # Errors
/// If it cannot be read.
pub fn boot_id(proc: &Path) -> Result<String, ReadBootIdError> {
    let path = proc.join("sys/kernel/random/boot_id");
    match fs::read_to_string(&path) {
        Ok(id) if !id.trim().is_empty() => Ok(id.trim().to_owned()),
        // It would count as the id of another boot.
        Ok(_) => Err(ReadBootIdError { path, source: io::Error::other("it is empty") }),
        Err(source) => Err(ReadBootIdError { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_boot_id_is_not_the_id_of_another_boot() {
        let proc = tempfile::tempdir().unwrap();
        let random = proc.path().join("sys/kernel/random");
        fs::create_dir_all(&random).unwrap();
        for empty in ["", "\n"] {
            fs::write(random.join("boot_id"), empty).unwrap();
            assert!(boot_id(proc.path()).is_err(), "{empty:?}");
        }
    }

    #[test]
    fn this_kernel_has_a_release_and_a_boot_id_in_the_shape_of_a_uuid() {
        let kernel = kernel(Path::new("/proc")).unwrap();
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert_eq!(kernel.release, release.trim());
        assert_eq!(
            (kernel.boot_id.len(), kernel.boot_id.matches('-').count()),
            (36, 4),
            "{}",
            kernel.boot_id
        );
    }

    #[test]
    fn without_procfs_the_error_names_the_file() {
        let error = kernel(Path::new("/nowhere")).unwrap_err();
        assert_eq!(error.to_string(), "cannot read the boot id from /nowhere/sys/kernel/random/boot_id");
    }
}
