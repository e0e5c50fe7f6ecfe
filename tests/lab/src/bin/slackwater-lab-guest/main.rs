//! The only program of the lab's Linux guest: see `slackwater_lab::guests::linux`.

mod disk;
mod ports;

use std::{ffi::CStr, fs::File, os::unix::fs::FileExt, path::Path, thread, time::Duration};

use anyhow::Context;
use rustix::{
    mount::{MountFlags, mount},
    system::finit_module,
};
use slackwater_lab::guests::{DEBUG_PORT, linux};

use disk::Disk;

/// The time between two lines.
const PACE: Duration = Duration::from_millis(20);
const LINES_A_REPORT: u64 = 8;
/// How many errors are reported in detail.
const DETAILED_ERRORS: u64 = 10;

fn main() -> anyhow::Result<()> {
    for (kind, to) in [("devtmpfs", "/dev"), ("sysfs", "/sys"), ("proc", "/proc")] {
        mount("none", to, kind, MountFlags::empty(), None::<&CStr>)
            .with_context(|| format!("mounting {to}"))?;
    }
    let debug = File::options().write(true).open("/dev/port").context("opening /dev/port")?;
    let failed = run(&debug).map_or_else(|error| error, |never| match never {});
    // The kernel panics when this returns, and QEMU ends.
    say(&debug, &format!("slackwater-lab-guest: {failed:#}\n"))?;
    Err(failed)
}

fn run(debug: &File) -> anyhow::Result<std::convert::Infallible> {
    load_modules()?;
    let mut ports = ports::of_cards()?;
    let mut disk = Disk::open()?;
    let (mut count, mut errors) = (0_u64, 0_u64);
    for number in 1_u64.. {
        let mut bad = 0;
        for (index, port) in ports.iter_mut().enumerate() {
            if let Some(back) = port.exchange(number)? {
                bad += 1;
                if errors + bad <= DETAILED_ERRORS {
                    let back = String::from_utf8_lossy(&back).into_owned();
                    say(debug, &format!("port {index}: line {number} came back as {back:?}\n"))?;
                }
            }
        }
        count += u64::from(bad == 0);
        errors += bad;
        if let Some(disk) = &mut disk {
            errors += u64::from(!disk.write(number)?);
        }
        if number % LINES_A_REPORT == 0 {
            let devices = ports.len();
            let written = disk.as_ref().map_or(0, Disk::written);
            say(
                debug,
                &format!(
                    "count={count} errors={errors} devices={devices} sent={number} received={count} bad={errors} \
                     written={written}\n"
                ),
            )?;
        }
        thread::sleep(PACE);
    }
    anyhow::bail!("there are no more numbers")
}

fn load_modules() -> anyhow::Result<()> {
    let folder = Path::new(linux::MODULES);
    for name in std::fs::read_to_string(folder.join("order")).context("reading the modules' order")?.lines() {
        let module =
            File::open(folder.join(name).with_extension("ko")).with_context(|| format!("opening {name}"))?;
        finit_module(&module, c"", 0).with_context(|| format!("loading {name}"))?;
    }
    Ok(())
}

/// A longer write to `/dev/port` would write each byte to the next port.
fn say(debug: &File, text: &str) -> anyhow::Result<()> {
    for byte in text.as_bytes() {
        debug
            .write_all_at(std::slice::from_ref(byte), u64::from(DEBUG_PORT))
            .context("writing to the debug port")?;
    }
    Ok(())
}
