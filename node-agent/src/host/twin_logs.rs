//! The logs of all twins of this node, kept short ([`log_limit`]): those that this agent has started, and
//! those of an earlier one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::{info, warn};

use crate::process::folder::Folder;
use crate::process::log_limit;

/// Between two looks. What a twin writes in this time is what its log may take above the limit.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Keeps the file `log` in each VM's folder in `vms` short. Never returns.
pub async fn keep_short(vms: PathBuf, log: &'static str) {
    loop {
        let folders = vms.clone();
        // It cannot fail unless it panics, and then the next look is another try.
        let _ = tokio::task::spawn_blocking(move || look(&folders, log)).await;
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// One look at all of them. A folder that cannot be used is another's concern: it is reported with its VM.
fn look(vms: &Path, log: &str) {
    for entry in fs::read_dir(vms).into_iter().flatten().flatten() {
        let path = entry.path();
        match shorten(&path, log) {
            Ok(None) => {}
            Ok(Some(cut_bytes)) => info!(vm = %path.display(), log, cut_bytes, "a log was too long"),
            Err(error) => warn!(vm = %path.display(), log, %error, "a log is too long and cannot be cut"),
        }
    }
}

fn shorten(folder: &Path, log: &str) -> io::Result<Option<u64>> {
    let is_long = |found: fs::Metadata| found.is_file() && found.len() > log_limit::LIMIT_BYTES;
    if !folder.join(log).symlink_metadata().is_ok_and(is_long) {
        return Ok(None);
    }
    let Some(folder) = Folder::open(folder)? else { return Ok(None) };
    match folder.append_own(log)? {
        Some(mut log) => log_limit::shorten(&mut log),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_logs_of_all_twins_are_kept_short_and_nothing_else_is_touched() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let long = vec![b'x'; 3 << 20];
        for vm in ["demo.a", "demo.b", "demo.c"] {
            fs::create_dir(dir.join(vm)).unwrap();
        }
        let outside = dir.join("precious");
        fs::write(&outside, &long).unwrap();
        fs::write(dir.join("demo.a/twin.log"), &long).unwrap();
        fs::write(dir.join("demo.a/disk.img"), &long).unwrap();
        symlink(&outside, dir.join("demo.b/twin.log")).unwrap();
        fs::hard_link(&outside, dir.join("demo.c/twin.log")).unwrap();
        look(&dir, "twin.log");
        assert!(fs::metadata(dir.join("demo.a/twin.log")).unwrap().len() <= log_limit::LIMIT_BYTES);
        assert_eq!(fs::metadata(dir.join("demo.a/disk.img")).unwrap().len(), 3 << 20);
        assert_eq!(fs::metadata(&outside).unwrap().len(), 3 << 20, "through a link");
    }
}
