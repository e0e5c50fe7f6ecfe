//! The Linux guest: the nodes' own kernel, and `slackwater-lab-guest` as its only program.
//!
//! Fifty times a second it sends the next of its numbered lines ([`super::lines`]) through every mtty card's
//! serial port, by the kernel's own driver and its interrupts, and reads it back: mtty returns what it is
//! sent. Not one byte may be lost, doubled, or out of order. If the VM has a disk, the line is written there,
//! too, past all caches, to a sector that must have been empty.

/// The kernel's path in the nodes.
pub const KERNEL: &str = "/usr/share/slackwater-lab/linux/vmlinuz";
/// The path of its initial file system in the nodes.
pub const INITRD: &str = "/usr/share/slackwater-lab/linux/initrd.cpio";
/// The path of the guest's modules, with their `order`, in its initial file system.
pub const MODULES: &str = "/modules";
/// The program that is the guest's first and only one.
pub const PROGRAM: &str = "slackwater-lab-guest";
/// The disk that it writes to, if there is one.
pub const DISK: &str = "/dev/vda";

/// The kernel's command line. It switches off what the guest does not need, since an emulated CPU is slow.
/// One port for every card, besides the four that a PC may have.
pub const COMMAND_LINE: &str = "quiet panic=-1 mitigations=off rcupdate.rcu_expedited=1 nokaslr lsm=capability \
    audit=0 nmi_watchdog=0 cryptomgr.notests 8250.nr_uarts=20";
