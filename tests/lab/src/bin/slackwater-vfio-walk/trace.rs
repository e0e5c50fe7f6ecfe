//! The kernel's own account of the states along the way: each driver asks `vfio_mig_get_next_state` once per
//! arc.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use slackwater_handover::state::MigrationState;

/// An instance of the kernel's tracer, with a probe on that function.
pub(crate) struct StepTrace {
    tracefs: PathBuf,
    instance: PathBuf,
}

const GROUP: &str = "slackwater_walk";

impl StepTrace {
    pub(crate) fn start(tracefs: &Path) -> Result<Self> {
        let instance = tracefs.join("instances").join(GROUP);
        let trace = Self { tracefs: tracefs.to_owned(), instance };
        let probe = format!("p:{GROUP}/step vfio_mig_get_next_state cur=$arg2:u32 new=$arg3:u32\n");
        append(&trace.tracefs.join("kprobe_events"), &probe)?;
        fs::create_dir(&trace.instance).context("making a trace instance")?;
        fs::write(trace.instance.join(format!("events/{GROUP}/step/enable")), "1")?;
        Ok(trace)
    }

    /// Forgets what has happened so far.
    pub(crate) fn clear(&self) -> Result<()> {
        Ok(fs::write(self.instance.join("trace"), "")?)
    }

    /// The states from which the drivers asked for the next one, since the last [`StepTrace::clear`].
    pub(crate) fn passed(&self) -> Result<Vec<MigrationState>> {
        let lines = fs::read_to_string(self.instance.join("trace"))?;
        lines.lines().filter(|line| !line.starts_with('#')).map(state_in).collect()
    }
}

impl Drop for StepTrace {
    fn drop(&mut self) {
        // What is left behind after a failure here only keeps the kernel's tracer busy.
        let _ = fs::write(self.instance.join(format!("events/{GROUP}/step/enable")), "0");
        let _ = fs::remove_dir(&self.instance);
        let _ = append(&self.tracefs.join("kprobe_events"), &format!("-:{GROUP}/step\n"));
    }
}

fn append(path: &Path, line: &str) -> Result<()> {
    use std::io::Write;
    let mut file = fs::OpenOptions::new()
        .append(true)
        .open(path)
        .with_context(|| format!("opening {}", path.display()))?;
    file.write_all(line.as_bytes()).with_context(|| format!("writing to {}", path.display()))
}

fn state_in(line: &str) -> Result<MigrationState> {
    let number = line.split_once("cur=").and_then(|(_, rest)| rest.split_whitespace().next());
    let number = number.with_context(|| format!("the trace has a line without a state: {line}"))?;
    Ok(MigrationState::try_from(number.parse::<u32>()?)?)
}
