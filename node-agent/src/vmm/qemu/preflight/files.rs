//! The files that a twin's arguments name, which must be at the destination. Pure, except for [`missing`].
//!
//! They are the values of some options (`-kernel`, `-bios` ...), and the values of [`KEYS`] in options of the
//! form `key=value,...` and in the JSON of `-blockdev`. A value that QEMU takes for an address and not for a
//! file is left out: by QEMU's rule (`path_has_protocol()` of block.c) a colon before the first slash makes
//! it one, as in `nbd:` or `https:`.

use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, accessat};
use serde_json::Value;

use super::{Finding, Kind};

/// Options whose value is a file.
const FILE_OPTIONS: [&str; 13] = [
    "kernel",
    "initrd",
    "dtb",
    "bios",
    "pflash",
    "cdrom",
    "hda",
    "hdb",
    "hdc",
    "hdd",
    "fda",
    "fdb",
    "readconfig",
];
/// A file, or a folder in which QEMU creates one.
const MEMORY_OPTION: &str = "mem-path";
/// Options with `key=value,...` among which there may be files.
const OPTIONS: [&str; 7] = ["drive", "blockdev", "object", "device", "fw_cfg", "smbios", "acpitable"];
/// The keys there. `romfile` and `bios` may also be names that QEMU looks for in its own folders.
const KEYS: [&str; 4] = ["file", "filename", "romfile", MEMORY_OPTION];

/// How a file is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// It is read.
    Read,
    /// It, or the folder that it is in, must exist: memory.
    Memory,
}

/// A file that an argument names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedFile {
    /// The number of the argument, from 0.
    index: usize,
    path: PathBuf,
    usage: Use,
}

/// All files that these arguments name.
pub fn in_arguments(arguments: &[String]) -> Vec<NamedFile> {
    let mut found = Vec::new();
    for (index, pair) in arguments.windows(2).enumerate() {
        let [option, value] = pair else { continue };
        let Some(option) = option.strip_prefix("--").or_else(|| option.strip_prefix('-')) else { continue };
        let mut add = |key: &str, value: &str| found.extend(file(index + 1, key, value));
        if FILE_OPTIONS.contains(&option) || option == MEMORY_OPTION {
            add(option, value);
        } else if OPTIONS.contains(&option) {
            match serde_json::from_str::<Value>(value).ok().filter(Value::is_object) {
                Some(json) => of_json(&json, &mut add),
                None => {
                    // There `file` is the name of another node, and `filename` the file.
                    let is_node =
                        |key: &str| option == "blockdev" && (key == "file" || key.ends_with(".file"));
                    let pairs = pairs(value);
                    let files = pairs.iter().filter(|(key, _)| !is_node(key));
                    files.for_each(|(key, value)| add(key, value));
                }
            }
        }
    }
    found
}

/// Strings only: `file` alone may be the name of another node, which is not a file.
fn of_json(json: &Value, add: &mut impl FnMut(&str, &str)) {
    for (key, value) in json.as_object().into_iter().flatten() {
        match value {
            Value::String(value) if key != "file" && is_key(key) => add(key, value),
            value => of_json(value, add),
        }
    }
}

fn is_key(key: &str) -> bool {
    KEYS.contains(&key.rsplit('.').next().unwrap_or(key))
}

/// `key=value,...`, where a comma in a value is written twice (util/keyval.c).
fn pairs(text: &str) -> Vec<(String, String)> {
    let mut parts = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        if c == ',' && rest.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    let pair = |part: &String| part.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
    let mut found: Vec<_> = parts.iter().filter_map(pair).collect();
    found.retain(|(key, _)| is_key(key));
    found
}

/// None if it is not a file, or one that QEMU searches in its own folders.
fn file(index: usize, key: &str, value: &str) -> Option<NamedFile> {
    let path = value.strip_prefix("file:").unwrap_or(value);
    let is_address = path.split('/').next().is_some_and(|first| first.contains(':'));
    let is_searched_for = matches!(key, "bios" | "romfile") && !path.starts_with('/');
    // A multiboot kernel's modules, with their arguments.
    let is_list = key == "initrd" && path.contains([',', ' ']);
    if path.is_empty() || is_address || is_searched_for || is_list || path.starts_with("/dev/fdset/") {
        return None;
    }
    let usage = if key.ends_with(MEMORY_OPTION) { Use::Memory } else { Use::Read };
    Some(NamedFile { index, path: PathBuf::from(path), usage })
}

/// The files that do not exist or cannot be read. No file is opened: opening a device can have an effect.
/// Relative paths start at the twin's folder.
pub fn missing(files: &[NamedFile], folder: &Path) -> Vec<Finding> {
    files.iter().filter_map(|file| finding(file, folder)).collect()
}

/// The files that are there, with the numbers of their arguments, but for those in the twin's folder: its own
/// user reads them if it may.
pub fn outside(files: &[NamedFile], folder: &Path) -> Vec<(usize, PathBuf)> {
    let there = files.iter().map(|file| (file.index, path_of(file, folder)));
    there.filter(|(_, path)| !path.starts_with(folder) && path.exists()).collect()
}

fn path_of(file: &NamedFile, folder: &Path) -> PathBuf {
    let path = folder.join(&file.path);
    match file.usage {
        Use::Memory if !path.exists() => path.parent().map(Path::to_owned).unwrap_or(path),
        _ => path,
    }
}

fn finding(file: &NamedFile, folder: &Path) -> Option<Finding> {
    let path = path_of(file, folder);
    let why = match accessat(CWD, &path, Access::READ_OK, AtFlags::EACCESS) {
        Ok(()) => return None,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => "is not there".to_owned(),
        Err(errno) => format!("cannot be read: {}", std::io::Error::from(errno)),
    };
    let message = format!("twin.args[{}] names {}, which {why}", file.index, path.display());
    Some(Finding::new(Kind::FileMissing, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(arguments: &[&str]) -> Vec<(usize, String)> {
        let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        in_arguments(&arguments)
            .into_iter()
            .map(|file| (file.index, file.path.display().to_string()))
            .collect()
    }

    #[test]
    fn files_are_found_wherever_arguments_name_them() {
        for (arguments, expected) in [
            (&["-S", "-kernel", "/boot/vmlinuz"][..], vec![(2, "/boot/vmlinuz")]),
            (&["--initrd", "initrd"], vec![(1, "initrd")]),
            (&["-bios", "/fw/bios.bin"], vec![(1, "/fw/bios.bin")]),
            (&["-drive", "if=none,file=/d/a,,b.raw,format=raw"], vec![(1, "/d/a,b.raw")]),
            (&["-drive", "if=pflash,file=file:/fw/vars.fd"], vec![(1, "/fw/vars.fd")]),
            (&["-drive", "driver=qcow2,file.driver=file,file.filename=/d/q"], vec![(1, "/d/q")]),
            (&["-blockdev", "driver=file,node-name=n,filename=/d/n"], vec![(1, "/d/n")]),
            (
                &[
                    "-blockdev",
                    r#"{"driver":"qcow2","file":{"driver":"file","filename":"/d/j"},"node-name":"n"}"#,
                ],
                vec![(1, "/d/j")],
            ),
            (
                &["-object", "memory-backend-file,id=m,mem-path=/dev/hugepages,size=1G"],
                vec![(1, "/dev/hugepages")],
            ),
            (&["-mem-path", "/dev/shm/x"], vec![(1, "/dev/shm/x")]),
            (&["-device", "virtio-net-pci,romfile=/roms/a.rom"], vec![(1, "/roms/a.rom")]),
            (&["-fw_cfg", "name=opt/x,file=/d/x"], vec![(1, "/d/x")]),
            (&["-pflash", "/fw/code.fd", "-cdrom", "/iso"], vec![(1, "/fw/code.fd"), (3, "/iso")]),
        ] {
            let expected: Vec<_> =
                expected.into_iter().map(|(index, path)| (index, path.to_owned())).collect();
            assert_eq!(paths(arguments), expected, "{arguments:?}");
        }
    }

    #[test]
    fn values_that_are_not_files_of_the_node_are_left_out() {
        for arguments in [
            &["-drive", "file=nbd://10.0.0.1:10809/x"][..],
            &["-drive", "if=none,driver=raw,file.driver=nbd,file.host=10.0.0.1,file.port=1"],
            &["-drive", "file=https://example.org/a/b.iso"],
            &["-drive", "file=rbd:pool/image"],
            &["-drive", "file=json:{}"],
            &["-blockdev", r#"{"driver":"qcow2","file":{"driver":"nbd","path":"/run/nbd.sock"}}"#],
            &["-blockdev", "driver=qcow2,node-name=a,file=b"],
            &["-blockdev", r#"{"driver":"qcow2","node-name":"a","file":"b"}"#],
            &["-drive", "file=/dev/fdset/3"],
            &["-drive", "file="],
            &["-bios", "bios-256k.bin"],
            &["-device", "virtio-net-pci,romfile="],
            &["-device", "virtio-net-pci,romfile=efi-virtio.rom"],
            &["-initrd", "/a.mod arg,/b.mod"],
            &["-chardev", "file,id=dbg,path=/run/out,append=on"],
            &["-name", "file=/x"],
            &["-kernel"],
        ] {
            assert_eq!(paths(arguments), [], "{arguments:?}");
        }
    }

    #[test]
    fn a_missing_file_is_reported_with_its_argument() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("there"), "").unwrap();
        let at = dir.path().display();
        let arguments = [
            "-kernel",
            "there",
            "-initrd",
            &format!("{at}/none"),
            "-drive",
            &format!("file={at}/there/below"),
            "-mem-path",
            &format!("{at}/made-by-qemu"),
            "-object",
            &format!("memory-backend-file,mem-path={at}/no/no"),
        ]
        .map(str::to_owned);
        let messages: Vec<String> = missing(&in_arguments(&arguments), dir.path())
            .into_iter()
            .map(|finding| finding.message)
            .collect();
        assert_eq!(
            messages,
            [
                format!("twin.args[3] names {at}/none, which is not there"),
                format!("twin.args[5] names {at}/there/below, which is not there"),
                format!("twin.args[9] names {at}/no, which is not there"),
            ]
        );
    }
}
