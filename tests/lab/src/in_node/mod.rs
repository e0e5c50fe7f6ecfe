//! The control service inside a node. It uses threads and blocking calls, one thread for each connection: it
//! shares one or two emulated CPUs with the programs that it observes.
//!
//! Invoked as `slackwater-lab-node serve`, or as `slackwater-lab-node launch CGROUP PROGRAM ARGUMENT...`,
//! which the service itself uses to put a program into a session and a cgroup of its own before it begins, or
//! as `slackwater-lab-node qmp SOCKET COMMAND ARGUMENTS`, which sends one command to a QEMU in the node, or
//! as `slackwater-lab-node qmp-migrate SOCKET URI`, which starts a migration and waits for its end, or as
//! `slackwater-lab-node babble SOCKET WHAT`, which serves garbage on a socket where the agent expects a QEMU.

mod babble;
mod launch;
mod processes;
mod qmp;
mod serve;

use anyhow::bail;

/// Runs the program with these arguments.
///
/// # Errors
/// When they are invalid, the service cannot listen, or the program cannot be launched.
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
