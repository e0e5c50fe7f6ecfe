//! The core stays pure: nothing that it is built with knows a runtime, a transport, a cluster, a device, a
//! clock or a file.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::process::Command;

/// Crates that would let the core wait, talk, or look at the machine. A name covers the crates whose names
/// begin with it.
const IMPURE: [&str; 14] = [
    "tokio",
    "tonic",
    "prost",
    "hyper",
    "h2",
    "kube",
    "k8s-openapi",
    "rustix",
    "libc",
    "vfio",
    "jiff",
    "chrono",
    "notify",
    "slackwater-",
];

#[test]
fn the_core_is_built_without_a_runtime_a_transport_a_cluster_a_clock_or_a_file() {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["tree", "--locked", "--offline", "--edges", "normal", "--prefix", "none", "--format", "{p}"])
        .args([
            "--package",
            env!("CARGO_PKG_NAME"),
            "--manifest-path",
            concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"),
        ])
        .output()
        .unwrap();
    let tree = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "cargo tree: {}", String::from_utf8_lossy(&output.stderr));
    let crates: Vec<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(crates.contains(&"thiserror"), "cargo tree shows the core's dependencies: {tree}");
    let impure: Vec<&&str> = crates
        .iter()
        .filter(|name| **name != env!("CARGO_PKG_NAME"))
        .filter(|name| IMPURE.iter().any(|impure| name.starts_with(impure)))
        .collect();
    assert!(impure.is_empty(), "the core depends on {impure:?}:\n{tree}");
}

#[test]
fn the_cores_own_code_uses_no_clock_file_thread_or_network() {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src");
    let mut folders = vec![std::path::PathBuf::from(source)];
    let mut looked_at = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            looked_at += 1;
            let text = std::fs::read_to_string(&path).unwrap();
            for impure in
                ["std::time", "std::fs", "std::net", "std::thread", "std::process", "std::env", "std::io"]
            {
                assert!(!text.contains(impure), "{} uses {impure}", path.display());
            }
        }
    }
    assert!(looked_at > 10, "only {looked_at} files were looked at");
}
