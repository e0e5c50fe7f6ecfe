//! The control service of the lab's nodes: see `slackwater_lab::in_node`.

use std::process::ExitCode;

fn main() -> ExitCode {
    match slackwater_lab::in_node::run(std::env::args().skip(1).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("slackwater-lab-node: {error:#}");
            ExitCode::FAILURE
        }
    }
}
