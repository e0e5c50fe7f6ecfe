//! The serial ports of the mtty cards.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
};

use anyhow::{Context, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
    termios::{ControlModes, OptionalActions, QueueSelector, tcflush, tcgetattr, tcsetattr},
};
use slackwater_lab::guests::lines::serial_line;

/// A line that is not back within this time is lost. By the guest's clock, which stops with the VM.
const ECHO_TIMEOUT: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
const AT_ONCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// An open port.
pub(crate) struct Port(File);

/// Opens every port that is on a PCI card, in the cards' order. The PC's own are not.
pub(crate) fn of_cards() -> anyhow::Result<Vec<Port>> {
    let mut ports = Vec::new();
    for entry in fs::read_dir("/sys/class/tty").context("listing the ports")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let place = fs::canonicalize(PathBuf::from("/sys/class/tty").join(&name))?;
        if name.starts_with("ttyS") && place.starts_with("/sys/devices/pci0000:00") {
            ports.push((place, name));
        }
    }
    ports.sort();
    ports.into_iter().map(|(_, name)| Port::open(&name)).collect()
}

impl Port {
    fn open(name: &str) -> anyhow::Result<Self> {
        let flags = (OFlags::NOCTTY | OFlags::NONBLOCK).bits();
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(i32::try_from(flags)?)
            .open(PathBuf::from("/dev").join(name))
            .with_context(|| format!("opening {name}"))?;
        let mut settings = tcgetattr(&file)?;
        settings.make_raw();
        settings.control_modes |= ControlModes::CLOCAL | ControlModes::CREAD;
        settings.set_speed(115_200)?;
        tcsetattr(&file, OptionalActions::Now, &settings)?;
        tcflush(&file, QueueSelector::IOFlush)?;
        Ok(Self(file))
    }

    /// Sends a line and reads it back. Returns what came back if that is something else.
    pub(crate) fn exchange(&mut self, number: u64) -> anyhow::Result<Option<Vec<u8>>> {
        let line = serial_line(number);
        let sent = self.0.write(&line).context("writing to a port")?;
        ensure!(sent == line.len(), "a port took {sent} bytes only");
        let mut back = Vec::new();
        while back.len() < line.len() && self.is_readable(ECHO_TIMEOUT)? {
            self.read(&mut back)?;
        }
        // Also read any byte too many.
        while self.is_readable(AT_ONCE)? {
            self.read(&mut back)?;
        }
        Ok((back != line).then_some(back))
    }

    fn read(&mut self, back: &mut Vec<u8>) -> anyhow::Result<()> {
        let mut bytes = [0; 64];
        let count = self.0.read(&mut bytes).context("reading from a port")?;
        ensure!(count > 0, "a port has hung up");
        back.extend_from_slice(bytes.get(..count).unwrap_or_default());
        Ok(())
    }

    fn is_readable(&self, limit: Timespec) -> anyhow::Result<bool> {
        Ok(poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&limit))? > 0)
    }
}
