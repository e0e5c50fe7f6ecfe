//! Generates the services from the .proto files, without protoc.

use std::path::Path;

const PROTOS: [&str; 3] =
    ["slackwater/node/v1/node.proto", "slackwater/transfer/v1/transfer.proto", "slackwater/vmm/v1/vmm.proto"];

fn main() -> anyhow::Result<()> {
    let root = Path::new("proto");
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(PROTOS, [root])?;
    tonic_prost_build::configure().bytes(".").compile_fds(files)?;
    Ok(())
}
