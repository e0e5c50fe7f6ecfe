//! The file system that a node boots into: busybox, the kernel's modules, the programs under test with the
//! shared libraries they need, and the lab's own init. It is built for each lab, so that a changed program
//! needs no other step.

mod cpio;
mod linux_guest;

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use cpio::Archive;

use crate::error::LabError;
use crate::host::installed::workspace_program;

/// What is in every node's `/bin` besides programs. The witness's two are read by `witness/`.
const SCRIPTS: [(&str, &[u8]); 2] = [
    ("witness-arm", include_bytes!("scripts/witness-arm.sh")),
    ("witness-collect", include_bytes!("scripts/witness-collect.sh")),
];

/// A file of this machine and where it goes in the nodes (absolute).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFile {
    /// On this machine.
    pub from: PathBuf,
    /// In the nodes.
    pub to: String,
}

/// The content of a node's image.
#[derive(Clone, Debug, Default)]
pub struct Image {
    /// Programs for `/bin`, with the shared libraries that they need.
    pub programs: Vec<PathBuf>,
    /// Other files of this machine.
    pub files: Vec<ImageFile>,
    /// Files that the lab generates.
    pub generated: Vec<GeneratedFile>,
}

/// A file that the lab generates for the nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GeneratedFile {
    /// Its path in the nodes (absolute).
    pub to: String,
    /// Its content.
    pub content: Vec<u8>,
}

impl Image {
    /// Adds a file with this content.
    #[must_use]
    pub fn with_generated(mut self, to: &str, content: Vec<u8>) -> Self {
        self.generated.push(GeneratedFile { to: to.to_owned(), content });
        self
    }

    /// Adds a program of the workspace to `/bin`.
    ///
    /// # Errors
    /// When it is not built.
    pub fn with_program(mut self, name: &str) -> Result<Self, LabError> {
        self.programs.push(workspace_program(name)?);
        Ok(self)
    }

    /// Adds this machine's QEMU with a firmware, so that nodes can run QEMU VMs with their devices. The nodes
    /// need 256 MiB more memory for it.
    ///
    /// # Errors
    /// When it is not installed.
    pub fn with_qemu(mut self) -> Result<Self, LabError> {
        let missing = || LabError::NotInstalled { what: "host-packages".into() };
        self.programs.push(which("qemu-system-x86_64").ok_or_else(missing)?);
        for file in ["seabios/bios-256k.bin", "qemu/kvmvapic.bin", "qemu/linuxboot_dma.bin"] {
            let path = Path::new("/usr/share").join(file);
            // The path where QEMU looks for it, which may be a link.
            let to = path.to_string_lossy().into_owned();
            self.files.push(ImageFile { from: path.canonicalize().map_err(|_| missing())?, to });
        }
        Ok(self)
    }
}

/// Writes the image to `to`. `kernel` is the folder that `install node-kernel` made.
pub(crate) fn write(image: &Image, kernel: &Path, to: &Path) -> Result<(), LabError> {
    let mut archive = Archive::default();
    fill(&mut archive, image, kernel)?;
    let bytes = archive.finish().map_err(LabError::io("writing the nodes' image"))?;
    fs::write(to, bytes).map_err(LabError::io(format!("writing {}", to.display())))
}

fn fill(archive: &mut Archive, image: &Image, kernel: &Path) -> Result<(), LabError> {
    let adding = || LabError::io("adding to the nodes' image");
    for folder in ["dev", "proc", "sys", "tmp", "run", "etc", "root", "var/log", "var/lib"] {
        archive.folder(folder).map_err(adding())?;
    }
    archive.file("init", 0o755, include_bytes!("scripts/node-init.sh")).map_err(adding())?;
    for (name, content) in SCRIPTS {
        archive.file(&format!("bin/{name}"), 0o755, content).map_err(adding())?;
    }
    add_busybox(archive)?;
    let modules = kernel.join("modules");
    for name in names_in(&modules)? {
        archive.file(&format!("modules/{name}"), 0o644, &read(&modules.join(&name))?).map_err(adding())?;
    }
    let mut libraries = BTreeSet::new();
    for program in &image.programs {
        let name = program.file_name().and_then(|name| name.to_str()).ok_or_else(|| {
            LabError::Configuration(format!("{} cannot be a program's path", program.display()))
        })?;
        archive.file(&format!("bin/{name}"), 0o755, &without_debug_information(program)?).map_err(adding())?;
        libraries.extend(libraries_of(program)?);
    }
    for library in libraries {
        let path = library.to_string_lossy().trim_start_matches('/').to_owned();
        archive.file(&path, 0o755, &read(&library)?).map_err(adding())?;
    }
    for file in &image.files {
        let mode = fs::metadata(&file.from)
            .map_err(LabError::io(format!("reading {}", file.from.display())))?
            .permissions()
            .mode();
        archive.file(file.to.trim_start_matches('/'), mode & 0o777, &read(&file.from)?).map_err(adding())?;
    }
    for file in &image.generated {
        archive.file(file.to.trim_start_matches('/'), 0o644, &file.content).map_err(adding())?;
    }
    Ok(())
}

fn add_busybox(archive: &mut Archive) -> Result<(), LabError> {
    let missing = |_| LabError::NotInstalled { what: "host-packages".into() };
    let busybox = which("busybox").ok_or(()).map_err(missing)?;
    let applets = output_of(Command::new(&busybox).arg("--list"))?;
    let adding = || LabError::io("adding busybox to the nodes' image");
    archive.file("bin/busybox", 0o755, &read(&busybox)?).map_err(adding())?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        archive.link(&format!("bin/{applet}"), "busybox").map_err(adding())?;
    }
    Ok(())
}

/// The program's bytes without debug information, which would be most of the file and take memory of every
/// node.
pub(crate) fn without_debug_information(program: &Path) -> Result<Vec<u8>, LabError> {
    let stripped = tempfile::NamedTempFile::new().map_err(LabError::io("making a temporary file"))?;
    output_of(Command::new("strip").arg("--strip-debug").arg("-o").arg(stripped.path()).arg(program))?;
    read(stripped.path())
}

/// The shared libraries that a program needs, the loader among them, each at the path where it is looked for.
pub(crate) fn libraries_of(program: &Path) -> Result<BTreeSet<PathBuf>, LabError> {
    // A static program makes ldd fail: it needs none.
    Ok(output_of(Command::new("ldd").arg(program)).map(|text| parse_ldd(&text)).unwrap_or_default())
}

fn parse_ldd(text: &str) -> BTreeSet<PathBuf> {
    let path = |line: &str| {
        let line = line.split_once("=>").map_or(line, |(_, path)| path);
        let path = line.split_whitespace().next()?;
        path.starts_with('/').then(|| PathBuf::from(path))
    };
    text.lines().filter_map(path).collect()
}

/// Finds a program in the PATH.
pub(crate) fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

fn output_of(command: &mut Command) -> Result<String, LabError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(LabError::io(format!("running {program}")))?;
    if !output.status.success() {
        return Err(LabError::ProgramFailed {
            program,
            ending: output.status.to_string(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, LabError> {
    fs::read(path).map_err(LabError::io(format!("reading {}", path.display())))
}

pub(crate) fn names_in(folder: &Path) -> Result<Vec<String>, LabError> {
    let names = || -> io::Result<Vec<String>> {
        fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    names().map_err(LabError::io(format!("listing {}", folder.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_and_the_libraries_are_found_and_the_vdso_is_not() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x1)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x2)\n\tlibgone.so => not found\n";
        let found: Vec<_> = parse_ldd(text).into_iter().collect();
        assert_eq!(
            found,
            [PathBuf::from("/lib/x86_64-linux-gnu/libc.so.6"), PathBuf::from("/lib64/ld-linux-x86-64.so.2")]
        );
    }
}
