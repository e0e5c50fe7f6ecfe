//! The product's main job on the lab: a VM with two assigned VFIO devices runs on one node, a `VMMigration`
//! is applied, and the VM continues with its devices on the other. The exit status is 0 only if all of that
//! was verified.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use slackwater_api::{DeviceMigration, DeviceStep, VMMigration, VMMigrationStatus};
use slackwater_lab::cluster::{Cluster, LabVm, NAMESPACE, QemuVm, has_condition};
use slackwater_lab::guests::lines::check_disk;
use slackwater_lab::witness::PeerToPeer;
use slackwater_lab::{LabConfig, NodeConfig};

/// Shows a VM with its VFIO devices moving from node-a to another node by `kubectl apply`.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many nodes there are; the VM moves from the first to the second.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(2..=9))]
    nodes: u8,
    /// How many devices the VM has.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=8))]
    devices: u8,
    /// What runs the VM.
    #[arg(long, value_enum, default_value_t = Vmm::Lab)]
    vmm: Vmm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Vmm {
    /// The reference VMM, whose devices the agent drives; its guest counts.
    Lab,
    /// QEMU, which drives its devices itself; its guest is a Linux that writes numbered lines through each
    /// device, a serial port, whose loop-back it compares, and to a disk that both nodes reach.
    Qemu,
}

/// The size of the disk that QEMU's guest writes to.
const DISK_MIB: u32 = 16;

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
    steps.say(
        "starting etcd, kube-apiserver and the nodes; installing the chart with helm; \
         starting operator and agents",
    );
    let names = (b'a'..).take(arguments.nodes.into()).map(|letter| format!("node-{}", char::from(letter)));
    let types = || (0..arguments.devices).map(|_| "mtty-1");
    let nodes = LabConfig::nodes(names.map(|name| NodeConfig::new(name, types())));
    let devices = usize::from(arguments.devices);
    let linux = QemuVm::linux(devices).with_shared_disk().with_migration_events();
    let nodes = match arguments.vmm {
        Vmm::Lab => nodes,
        Vmm::Qemu => linux.in_nodes(nodes)?.with_shared_disk(DISK_MIB),
    };
    let mut cluster = Cluster::start_with(nodes, "").await?;

    steps.say(&match arguments.vmm {
        Vmm::Lab => {
            format!("starting the VM {NAMESPACE}/counter with {devices} assigned devices on node-a")
        }
        Vmm::Qemu => format!(
            "starting QEMU's VM {NAMESPACE}/linux, a Linux with {devices} assigned serial ports and a shared disk, \
             on node-a"
        ),
    });
    match arguments.vmm {
        Vmm::Lab => LabVm::counter(devices).start(cluster.lab.node("node-a")?).await?,
        Vmm::Qemu => cluster.start_qemu(linux, "node-a").await?,
    }
    cluster.until_vm_at("node-a").await?;
    show(&cluster).await?;

    let watching = cluster.watch("node-a", "node-b").await?;
    steps.say(&format!("the guest on node-a counts: {}", describe(&watching.before)));
    steps.say("kubectl apply of this VMMigration:");
    let name = format!("move-{}", cluster.vm_name());
    let manifest = manifest(&name, cluster.vm_name());
    print!("{}", indented(&manifest));
    cluster.apply(&name, &manifest).await?;
    let migration = cluster.until_ended(&name).await?;
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
    steps.say(&format!("the guest on node-b counts: {}", describe(&verdict.after)));
    show(&cluster).await?;
    timeline(&migration, &status);

    println!("\nJudged by the two kernels' own traces:\n{verdict}");
    let requests = cluster.nothing_was_forbidden()?;
    println!("  RBAC                     {requests} requests of the operator, none refused");
    if arguments.vmm == Vmm::Qemu {
        disk(&cluster, verdict.after.count).await?;
    }
    steps.say("all of it was verified");
    Ok(())
}

fn manifest(name: &str, vm: &str) -> String {
    format!(
        "apiVersion: slackwater.dev/v1alpha1\n\
         kind: VMMigration\n\
         metadata: {{name: {name}, namespace: {NAMESPACE}}}\n\
         spec:\n  \
           vmRef: {{kind: AssignedVM, name: {vm}}}\n  \
           target: {{nodeName: node-b}}\n"
    )
}

/// Ends the VM and reads the disk that both its QEMUs wrote to.
async fn disk(cluster: &Cluster, counted: u64) -> anyhow::Result<()> {
    cluster.kill_vmm("node-b").await?;
    let disk = std::fs::read(cluster.lab.shared_disk()?)?;
    let lines = check_disk(&disk)?;
    ensure!(lines >= counted, "{lines} lines are on the disk, and the guest has counted {counted}");
    println!("  shared disk              {lines} lines, none missing, none twice, none by two writers");
    Ok(())
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

fn describe(guest: &slackwater_reference_vmm::guest::Report) -> String {
    let mut text = guest.count.to_string();
    for (number, device) in guest.devices.iter().enumerate() {
        text += if number == 0 { ", registers " } else { " " };
        text += &format!("{:#04x}", device.register);
    }
    format!("{text}, errors {}", guest.errors)
}

/// The timeline in the status: phases, and each device's states.
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
