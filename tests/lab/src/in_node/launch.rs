//! The step between the service's fork and the program's exec. It is a program of its own, as nothing but
//! async-signal-safe calls (and `unsafe`) could do the same in the forked child.

use std::{convert::Infallible, fs, os::unix::process::CommandExt, path::Path, process::Command};

use anyhow::Context;

/// The parent of the cgroups of spawned programs.
pub(super) const CGROUPS: &str = "/sys/fs/cgroup/lab";

/// Enters the cgroup, opens a session, and becomes the program. Returns only when that fails.
pub(super) fn launch(cgroup: &str, program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    fs::write(Path::new(cgroup).join("cgroup.procs"), "0").with_context(|| format!("entering {cgroup}"))?;
    rustix::process::setsid().context("opening a session")?;
    let failed: Result<Infallible, _> = Err(Command::new(program).args(arguments).exec());
    match failed.with_context(|| format!("starting {program}"))? {}
}
