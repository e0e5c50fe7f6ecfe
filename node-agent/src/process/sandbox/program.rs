//! What a program needs to be executed: its file, and the node's libraries if it is linked against any.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::{Link, Shown};

/// Where the node has programs, libraries, and what these read. On most nodes some are links.
const SYSTEM: [&str; 7] = ["/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin"];
/// Where the loader looks up libraries.
const LOADER_CACHE: &str = "/etc/ld.so.cache";

/// How much of a file is read: the header of ELF and the table behind it.
const HEAD_BYTES: u64 = 4096;

/// What is shown of the node so that `program` can be executed: for a static program itself alone.
///
/// # Errors
/// If it cannot be read.
pub fn shown_for(program: &Path) -> io::Result<(Vec<Shown>, Vec<Link>)> {
    let mut head = Vec::new();
    File::open(program)?.take(HEAD_BYTES).read_to_end(&mut head)?;
    if is_static(&head) {
        return Ok((vec![Shown::read_only(program)], Vec::new()));
    }
    let (mut shown, mut links) = (Vec::new(), Vec::new());
    for path in SYSTEM.map(PathBuf::from) {
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_symlink() => links.push(Link { target: fs::read_link(&path)?, path }),
            Ok(found) if found.is_dir() => shown.push(Shown::read_only(path)),
            _ => {}
        }
    }
    if Path::new(LOADER_CACHE).is_file() {
        shown.push(Shown::read_only(LOADER_CACHE));
    }
    let system = |path: &Path| SYSTEM.iter().any(|folder| path.starts_with(folder));
    // By its folder: libraries may lie beside it.
    if let Some(folder) = program.parent().filter(|_| !system(program)) {
        shown.push(Shown::read_only(if folder == Path::new("/") { program } else { folder }));
    }
    Ok((shown, links))
}

/// Whether this is the head of a 64-bit little-endian ELF program without an interpreter (PT_INTERP): elf(5).
fn is_static(head: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let number = |at: usize, bytes: usize| -> Option<u64> {
        let field = head.get(at..at.checked_add(bytes)?)?;
        Some(field.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    };
    let segments = || -> Option<Vec<u32>> {
        // e_phoff, e_phentsize, e_phnum; p_type is the first field of a segment.
        let (table, size, count) = (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?);
        let at = |index: u64| usize::try_from(table.checked_add(index * size)?).ok();
        (0..count).map(|index| u32::try_from(number(at(index)?, 4)?).ok()).collect()
    };
    head.starts_with(b"\x7fELF\x02\x01") && segments().is_some_and(|kinds| !kinds.contains(&PT_INTERP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_with_libraries_sees_the_nodes_and_its_own_folder() {
        let this = std::env::current_exe().unwrap();
        let (shown, links) = shown_for(&this).unwrap();
        assert!(shown.contains(&Shown::read_only(this.parent().unwrap())), "{shown:?}");
        assert!(shown.iter().any(|shown| shown.path == Path::new("/usr")), "{shown:?}");
        assert!(shown.iter().all(|shown| !shown.writable));
        for link in links {
            assert_eq!(fs::read_link(&link.path).unwrap(), link.target);
        }
    }

    #[test]
    fn what_is_not_wholly_understood_is_not_taken_for_static() {
        let this = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(!is_static(&this[..4096]));
        for bad in [&b""[..], b"#!/bin/sh\n", b"\x7fELF\x02\x01", &this[..0x40]] {
            assert!(!is_static(bad));
        }
        let mut without = this[..4096].to_vec();
        let table = usize::from(without[0x20]);
        let count = usize::from(without[0x38]);
        for index in 0..count {
            let at = table + index * 56;
            if without[at] == 3 {
                without[at] = 4;
            }
        }
        assert!(is_static(&without));
    }
}
