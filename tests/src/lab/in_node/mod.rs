//! What runs inside a node: the control service. Threads and blocking calls, one thread a connection: it shares one or two
//! emulated CPUs with what it is to observe.
//!
//! Invoked as `slackwater-lab-node serve`, or as `slackwater-lab-node launch CGROUP PROGRAM ARGUMENT...`, which the service
//! itself uses to put a program into a session and a cgroup of its own before it begins.

mod launch;
mod processes;
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
        _ => bail!("usage: slackwater-lab-node serve | launch CGROUP PROGRAM ARGUMENT..."),
    }
}
