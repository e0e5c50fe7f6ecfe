//! The steps that a journal takes on the disk, each of which tests let fail.

#[cfg(test)]
use std::{fmt, io};

#[cfg(test)]
use parking_lot::Mutex;

/// A step on the disk, by the name of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step<'a> {
    /// A file is opened, and made if it is not there.
    Open(&'a str),
    Read(&'a str),
    /// A file's bytes are written, or allocated.
    Write(&'a str),
    Truncate(&'a str),
    SyncFile(&'a str),
    /// A file gets this name.
    Rename(&'a str),
    Remove(&'a str),
    SyncDirectory,
}

/// Decides whether a step fails.
#[cfg(test)]
pub(super) type Fails = Box<dyn FnMut(Step<'_>) -> io::Result<()> + Send>;

/// What a test lets fail.
#[cfg(test)]
#[derive(Default)]
pub(super) struct DiskFaults(Mutex<Option<Fails>>);

#[cfg(test)]
impl fmt::Debug for DiskFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DiskFaults")
    }
}

#[cfg(test)]
impl DiskFaults {
    pub(super) fn before(&self, step: Step<'_>) -> io::Result<()> {
        self.0.lock().as_mut().map_or(Ok(()), |fails| fails(step))
    }

    /// From now on, `fails` decides.
    pub(super) fn set(&self, fails: impl FnMut(Step<'_>) -> io::Result<()> + Send + 'static) {
        *self.0.lock() = Some(Box::new(fails));
    }

    /// Everything succeeds, until what is returned is put back.
    pub(super) fn take(&self) -> Option<Fails> {
        self.0.lock().take()
    }

    pub(super) fn put(&self, fails: Option<Fails>) {
        *self.0.lock() = fails;
    }

    /// Everything succeeds again.
    pub(super) fn clear(&self) {
        *self.0.lock() = None;
    }
}
