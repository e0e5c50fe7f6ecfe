//! The product's main job, shown on the lab: a VM with two assigned VFIO devices runs on one node, somebody applies a `VMMigration`,
//! and the VM runs on with its devices on the other. It ends with 0 only if all of that was verified.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Parser;
use slackwater_api::{DeviceMigration, DeviceStep, VMMigration, VMMigrationStatus};
use slackwater_tests::cluster::{Cluster, LabVm, NAMESPACE, has_condition};
use slackwater_tests::lab::NodeConfig;
use slackwater_tests::witness::PeerToPeer;

/// Shows a VM with its VFIO devices moving from node-a to another node by `kubectl apply`.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many nodes there are; the VM moves from the first to the second.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(2..=9))]
    nodes: u8,
    /// How many devices the VM has.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=8))]
    devices: u8,
}

/// Prints what is being done, and how long after the start.
struct Steps(Instant);

impl Steps {
    fn say(&self, what: &str) {
        println!("[{:6.1} s] {what}", self.0.elapsed().as_secs_f64());
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    match demo(&Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nthe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn demo(arguments: &Arguments) -> anyhow::Result<()> {
    let steps = Steps(Instant::now());
    steps.say("starting etcd, kube-apiserver and the nodes; installing the chart with helm; starting operator and agents");
    let names = (b'a'..).take(arguments.nodes.into()).map(|letter| format!("node-{}", char::from(letter)));
    let types = || (0..arguments.devices).map(|_| "mtty-1");
    let cluster = Cluster::start(names.map(|name| NodeConfig::new(name, types()))).await?;

    let devices = usize::from(arguments.devices);
    steps.say(&format!("starting the VM {NAMESPACE}/counter with {devices} assigned devices on node-a"));
    LabVm::counter(devices).start(cluster.lab.node("node-a")?).await?;
    cluster.until_vm_at("node-a").await?;
    show(&cluster).await?;

    let watching = cluster.watch("node-a", "node-b").await?;
    steps.say(&format!("the guest on node-a counts: {}", told(&watching.before)));
    steps.say("kubectl apply of this VMMigration:");
    let manifest = manifest();
    print!("{}", indented(&manifest));
    cluster.apply("move-counter", &manifest).await?;
    let migration = cluster.until_ended("move-counter").await?;
    let status = migration.status.clone().context("the VMMigration has no status")?;
    ensure!(
        has_condition(&status.conditions, "Succeeded", "True") == Some(true),
        "the migration did not succeed: {:#?}",
        status.conditions
    );
    steps.say("the VMMigration has succeeded");
    cluster.until_vm_at("node-b").await?;
    cluster.until_free("node-a", i32::from(arguments.devices)).await?;
    let verdict = cluster.judge_success(&watching, &migration, PeerToPeer::Required).await?;
    steps.say(&format!("the guest on node-b counts: {}", told(&verdict.after)));
    show(&cluster).await?;
    timeline(&migration, &status);

    println!("\nJudged by the two kernels' own traces:\n{verdict}");
    let requests = cluster.nothing_was_forbidden()?;
    println!("  RBAC                     {requests} requests of the operator, none refused");
    steps.say("all of it was verified");
    Ok(())
}

fn manifest() -> String {
    format!(
        "apiVersion: slackwater.dev/v1alpha1\n\
         kind: VMMigration\n\
         metadata: {{name: move-counter, namespace: {NAMESPACE}}}\n\
         spec:\n  \
           vmRef: {{kind: AssignedVM, name: counter}}\n  \
           target: {{nodeName: node-b}}\n"
    )
}

async fn show(cluster: &Cluster) -> anyhow::Result<()> {
    for kinds in ["migrationnodes", "assignedvms", "vmmigrations"] {
        println!("\n  $ kubectl get {kinds} -A");
        let table = cluster.kubectl(&["get", kinds, "-A"]).await?;
        print!("{}", indented(if table.is_empty() { "No resources found\n" } else { &table }));
    }
    println!();
    Ok(())
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect()
}

fn told(guest: &slackwater_tests::vmm::guest::Report) -> String {
    let registers: Vec<String> =
        guest.devices.iter().map(|device| format!("{:#04x}", device.register)).collect();
    format!("{}, registers {}, errors {}", guest.count, registers.join(" "), guest.errors)
}

/// What the status says happened when: phases, and each device's states.
fn timeline(migration: &VMMigration, status: &VMMigrationStatus) {
    println!("Timeline of {} (times since its start, on the source's clock)", migration.spec.vm_ref.name);
    for entry in &status.timeline {
        println!("  {:>12}  {:<8} {}", entry.elapsed, entry.node, entry.phase);
    }
    for DeviceMigration { source, target, bytes, states, .. } in &status.devices {
        println!("\n  {source} -> {target}, {} bytes", bytes.unwrap_or_default());
        for DeviceStep { node, state, elapsed, took, .. } in states {
            println!("  {elapsed:>12}  {node:<8} {state:<13} took {took}");
        }
    }
    if let Some(timings) = &status.timings {
        println!("\n  pre-copy {}, blackout {}, total {}", timings.pre_copy, timings.blackout, timings.total);
    }
    if let Some(bytes) = &status.bytes {
        println!("  devices {} bytes, RAM and machine state {} bytes", bytes.devices, bytes.vmm);
    }
}
