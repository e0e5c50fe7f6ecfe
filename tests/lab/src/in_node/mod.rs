//! What runs inside a node: the control service. Threads and blocking calls, one thread a connection: it shares one or two
//! emulated CPUs with what it is to observe.
//!
//! Invoked as `slackwater-lab-node serve`, or as `slackwater-lab-node launch CGROUP PROGRAM ARGUMENT...`, which the service
//! itself uses to put a program into a session and a cgroup of its own before it begins, or as
//! `slackwater-lab-node qmp SOCKET COMMAND ARGUMENTS`, which has a QEMU in the node execute one command, or as
//! `slackwater-lab-node qmp-migrate SOCKET URI`, which has it migrate, or as
//! `slackwater-lab-node babble SOCKET WHAT`, which serves a socket on which a QEMU is expected and is none.

mod babble;
mod launch;
mod processes;
mod qmp;
mod serve;

use anyhow::bail;

/// Runs the program with these arguments.
///
/// # Errors
/// When they make no sense, the service cannot listen, or the program cannot be launched.
pub fn run(arguments: Vec<String>) -> anyhow::Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["serve"] => serve::serve(),
        ["launch", cgroup, program, arguments @ ..] => launch::launch(cgroup, program, arguments),
        ["qmp", socket, command, arguments] => qmp::execute(socket, command, arguments),
        ["qmp-migrate", socket, uri] => qmp::migrate(socket, uri),
        ["babble", socket, what] => babble::serve(socket, what),
        _ => bail!(
            "usage: slackwater-lab-node serve | launch CGROUP PROGRAM ARGUMENT... | qmp SOCKET COMMAND ARGUMENTS | \
             qmp-migrate SOCKET URI | babble SOCKET WHAT"
        ),
    }
}
