//! A random walk: migrations back and forth, each with a random fault at a random time. Afterwards the VM
//! runs on exactly one node, unless its own process was killed, and everything is where it belongs.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use slackwater_api::VMMigration;
use tokio::time::sleep;

use super::matrix::Side;
use super::questions;
use super::scene::Ends;
use super::stage::Stage;
use crate::cluster::Watching;

/// A small random number generator with a seed (SplitMix64 by Sebastiano Vigna).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator with this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One of these; `first` if there are none.
    fn one_of<T: Copy>(&mut self, of: &[T], first: T) -> T {
        let index = self.next() % (of.len().max(1) as u64);
        of.get(usize::try_from(index).unwrap_or(0)).copied().unwrap_or(first)
    }

    /// A duration up to `most`.
    fn up_to(&mut self, most: Duration) -> Duration {
        let most_ms = u64::try_from(most.as_millis()).unwrap_or(u64::MAX);
        Duration::from_millis(self.next() % most_ms.saturating_add(1))
    }
}

/// A fault that hits a migration of the walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkFault {
    /// Nothing.
    Nothing,
    /// One agent is killed with its cgroup, and started again.
    Agent(Side),
    /// Both are.
    BothAgents,
    /// The operator is killed, and started again.
    Operator,
    /// The VMM at one end is killed, if there is one then.
    Vmm(Side),
    /// The link between the nodes is cut for a while.
    Link,
    /// The destination is cut off from the source and the operator for a while.
    CutOff,
    /// A device refuses a state for a while.
    DeviceError(Side, &'static str),
    /// A device takes some seconds longer.
    DeviceHang(Side, &'static str),
    /// The API server does not answer for a while.
    ApiServer,
}

/// One migration of the walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The fault.
    pub fault: WalkFault,
    /// How long after the migration was requested it hits.
    pub after: Duration,
    /// How long it lasts.
    pub lasts: Duration,
}

/// A migration takes 1 to 3 s on the lab: most faults hit it.
const LATEST: Duration = Duration::from_millis(2500);
/// Long enough for the other components to notice that something is down or slow.
const LONGEST: Duration = Duration::from_secs(3);
/// A cut is noticed after 7 s at most, so that some are noticed and some are not.
const LONGEST_CUT: Duration = Duration::from_secs(10);

impl Step {
    /// A random step.
    pub fn random(random: &mut Random) -> Self {
        use Side::{Destination, Source};
        // Not RUNNING and RUNNING_P2P at the destination: if a device refuses these, losing the VM is
        // correct.
        let states = [
            (Source, "PRE_COPY"),
            (Source, "PRE_COPY_P2P"),
            (Source, "STOP_COPY"),
            (Source, "read"),
            (Destination, "RESUMING"),
            (Destination, "STOP"),
            (Destination, "write"),
        ];
        let (side, state) = random.one_of(&states, (Source, "STOP_COPY"));
        let faults = [
            WalkFault::Nothing,
            WalkFault::Agent(Source),
            WalkFault::Agent(Source),
            WalkFault::Agent(Destination),
            WalkFault::Agent(Destination),
            WalkFault::BothAgents,
            WalkFault::Operator,
            WalkFault::Vmm(Source),
            WalkFault::Vmm(Destination),
            WalkFault::Link,
            WalkFault::Link,
            WalkFault::CutOff,
            WalkFault::CutOff,
            WalkFault::DeviceError(side, state),
            WalkFault::DeviceHang(side, state),
            WalkFault::ApiServer,
        ];
        let fault = random.one_of(&faults, WalkFault::Nothing);
        let longest =
            if matches!(fault, WalkFault::Link | WalkFault::CutOff) { LONGEST_CUT } else { LONGEST };
        Self { fault, after: random.up_to(LATEST), lasts: random.up_to(longest) }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} after {} ms, for {} ms", self.fault, self.after.as_millis(), self.lasts.as_millis())
    }
}

/// Walks this number of steps. Each is printed before it is taken.
///
/// # Errors
/// With the seed, the step, and what was wrong.
pub async fn walk(stage: &mut Stage, seed: u64, steps: usize) -> anyhow::Result<()> {
    let mut random = Random::new(seed);
    for number in 1..=steps {
        let step = Step::random(&mut random);
        print!("walk {seed}, step {number} of {steps}: {step}");
        match take(stage, &step).await {
            Ok(end) => println!(": {end}"),
            Err(error) => {
                println!();
                let evidence = stage.evidence(Duration::from_secs(120)).await;
                bail!(
                    "the walk with seed {seed} went wrong at step {number} ({step}): {error:#}\n{evidence}"
                );
            }
        }
    }
    Ok(())
}

async fn take(stage: &mut Stage, step: &Step) -> anyhow::Result<String> {
    let ends = stage.ready().await?;
    let name = stage.next_name("walk");
    let watching = stage.cluster.watch(ends.source, ends.destination).await?;
    let injected = inject(stage, step, ends, &name).await;
    let healed = heal(stage, ends).await;
    injected.and(healed)?;
    let migration = stage.cluster.until_ended(&name).await?;
    let end = judge(stage, step, ends, &watching, &migration).await;
    let status = migration.status.context("no status")?;
    let succeeded = status.conditions.into_iter().find(|condition| condition.type_ == "Succeeded");
    let reported =
        succeeded.map(|condition| format!("{} ({})", condition.status, condition.reason)).unwrap_or_default();
    let end = end.with_context(|| format!("the status says Succeeded={reported}"))?;
    stage.cluster.delete(&name).await?;
    Ok(format!("{end}, Succeeded={reported}"))
}

async fn judge(
    stage: &mut Stage,
    step: &Step,
    ends: Ends,
    watching: &Watching,
    migration: &VMMigration,
) -> anyhow::Result<String> {
    let Some((side, guest)) = questions::runner(&stage.cluster, ends).await? else {
        stage.vm_is_at(None);
        ensure!(
            matches!(step.fault, WalkFault::Vmm(_)),
            "the VM runs nowhere, although its process was not killed"
        );
        return Ok("lost with its process".to_owned());
    };
    ensure!(
        guest.count > watching.before.count,
        "the guest went back from {} to {guest:?}",
        watching.before.count
    );
    ensure!(guest.errors == watching.before.errors, "the guest found errors: {guest:?}");
    let home = ends.at(side);
    stage.vm_is_at(Some(home));
    questions::only_one_ran(&stage.cluster, side, watching).await?;
    stage.cluster.until_vm_at(home).await?;
    questions::is_clean(&stage.cluster, ends, home, migration).await?;
    Ok(format!("runs at the {}, count {}", side.name(), guest.count))
}

/// Starts the migration and injects the fault.
async fn inject(stage: &mut Stage, step: &Step, ends: Ends, name: &str) -> anyhow::Result<()> {
    let cluster = &mut stage.cluster;
    if let WalkFault::DeviceError(side, state) | WalkFault::DeviceHang(side, state) = step.fault {
        let what = match step.fault {
            WalkFault::DeviceError(..) => format!("device.error={state}\n"),
            _ => format!("device.hang={state}:{}\n", step.lasts.as_secs()),
        };
        cluster.set_faults(ends.at(side), &what).await?;
    }
    cluster.migrate(name, &format!("target: {{nodeName: {}}}", ends.destination)).await?;
    sleep(step.after).await;
    match step.fault {
        WalkFault::Nothing => {}
        WalkFault::Agent(side) => {
            cluster.kill_agent(ends.at(side)).await?;
            sleep(step.lasts).await;
            cluster.restart_agent(ends.at(side)).await?;
        }
        WalkFault::BothAgents => {
            for side in [Side::Source, Side::Destination] {
                cluster.kill_agent(ends.at(side)).await?;
            }
            sleep(step.lasts).await;
            for side in [Side::Destination, Side::Source] {
                cluster.restart_agent(ends.at(side)).await?;
            }
        }
        WalkFault::Operator => {
            cluster.kill_operator().await;
            sleep(step.lasts).await;
            cluster.start_operator().await?;
        }
        WalkFault::Vmm(side) => cluster.kill_vmm_if_any(ends.at(side)).await?,
        WalkFault::Link => {
            cluster.lab.cut_link(ends.destination).await?;
            sleep(step.lasts).await;
        }
        WalkFault::CutOff => {
            cluster.isolate(ends.destination).await?;
            sleep(step.lasts).await;
        }
        WalkFault::DeviceError(..) | WalkFault::DeviceHang(..) => sleep(step.lasts).await,
        WalkFault::ApiServer => {
            cluster.lab.control_plane()?.freeze_api_server()?;
            sleep(step.lasts).await;
        }
    }
    Ok(())
}

async fn heal(stage: &mut Stage, ends: Ends) -> anyhow::Result<()> {
    let cluster = &mut stage.cluster;
    cluster.lab.control_plane()?.thaw_api_server()?;
    cluster.reconnect(ends.destination).await?;
    for node in [ends.source, ends.destination] {
        cluster.set_faults(node, "").await?;
    }
    if !cluster.has_operator() {
        cluster.start_operator().await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_walk_and_another_one_another() {
        let walk = |seed| {
            let mut random = Random::new(seed);
            (0..50).map(|_| Step::random(&mut random)).collect::<Vec<_>>()
        };
        assert_eq!(walk(7), walk(7));
        assert_ne!(walk(7), walk(8));
    }

    #[test]
    fn a_long_walk_has_every_kind_of_fault_within_the_limits() {
        let mut random = Random::new(1);
        let steps: Vec<Step> = (0..1000).map(|_| Step::random(&mut random)).collect();
        let occurs = |fault: fn(&WalkFault) -> bool| steps.iter().any(|step| fault(&step.fault));
        assert!(
            occurs(|fault| *fault == WalkFault::BothAgents) && occurs(|fault| *fault == WalkFault::ApiServer)
        );
        assert!(occurs(|fault| matches!(fault, WalkFault::DeviceError(Side::Destination, "STOP"))));
        assert!(steps.iter().all(|step| step.after <= LATEST && step.lasts <= LONGEST_CUT));
    }
}
