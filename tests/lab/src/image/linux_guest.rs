//! The files of the Linux guest: the nodes' own kernel, and an initial file system with one program.

use std::path::Path;

use super::cpio::Archive;
use super::{Image, ImageFile, libraries_of, names_in, read, without_debug_information};
use crate::error::LabError;
use crate::guests::linux;
use crate::host::installed::{installed, workspace_program};

impl Image {
    /// Adds the Linux guest. The nodes need 48 MiB more memory for it.
    ///
    /// # Errors
    /// When its kernel is not installed, or its program not built.
    pub fn with_linux_guest(mut self) -> Result<Self, LabError> {
        let kernel = installed("node-kernel")?;
        self.files.push(ImageFile { from: kernel.join("vmlinuz"), to: linux::KERNEL.to_owned() });
        let program = workspace_program(linux::PROGRAM)?;
        Ok(self.with_generated(linux::INITRD, initial_file_system(&program, &kernel.join("guest-modules"))?))
    }
}

fn initial_file_system(program: &Path, modules: &Path) -> Result<Vec<u8>, LabError> {
    let adding = || LabError::io("adding to the Linux guest's file system");
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys"] {
        archive.folder(folder).map_err(adding())?;
    }
    archive.file("init", 0o755, &without_debug_information(program)?).map_err(adding())?;
    for library in libraries_of(program)? {
        let path = library.to_string_lossy().trim_start_matches('/').to_owned();
        archive.file(&path, 0o755, &read(&library)?).map_err(adding())?;
    }
    let folder = linux::MODULES.trim_start_matches('/');
    for name in names_in(modules)? {
        archive.file(&format!("{folder}/{name}"), 0o644, &read(&modules.join(&name))?).map_err(adding())?;
    }
    archive.finish().map_err(adding())
}
