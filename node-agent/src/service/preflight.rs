//! Whether this node's QEMU could take over a QEMU VM: asked at Reserve, before anything is touched.

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use slackwater_handover::Reason;
use slackwater_proto::node::{QemuDescription, ReserveRequest};
use slackwater_proto::refusal::Refusal;
use tokio::sync::Mutex;
use tracing::{info, warn};

use super::config::NodeConfig;
use super::reason::ServiceReason;
use crate::host::vm::{self, VmmKind};
use crate::process::folder::Folder;
use crate::process::sandbox::Sandbox;
use crate::process::sandbox::check::{Reach, check};
use crate::vmm::qemu::preflight::confined::QEMU_SANDBOX;
use crate::vmm::qemu::preflight::probe::Prober;
use crate::vmm::qemu::preflight::{
    Accelerator, Facts, Finding, Kind, Offer, Verdict, compare, confined, files,
};
use crate::vmm::twin::{TwinPlan, launcher};

/// Within this time a program must have said what it can do.
const PROBE_LIMIT: Duration = Duration::from_secs(20);
/// An answer that is not older than this counts as up to date.
const FRESH: Duration = Duration::from_secs(10);
/// For this long a program that could not be asked is not tried again, if it took long to find out: each
/// reservation of the node would wait for it.
const FAILURE_LASTS: Duration = Duration::from_secs(60);
/// What fails sooner is tried again: that costs little.
const LONG: Duration = Duration::from_secs(5);
const KVM: &str = "/dev/kvm";

/// A program as it was when it was asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Asked {
    program: PathBuf,
    length_bytes: u64,
    modified: Option<SystemTime>,
    accelerator: Accelerator,
}

/// Why a program could not be asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
struct NotAsked(String);

/// What a program has answered.
type ProbeResult = Result<Arc<Offer>, NotAsked>;

/// When programs were asked, and what they answered.
#[derive(Default)]
struct Answers(HashMap<Asked, (Instant, ProbeResult)>);

impl Answers {
    /// The answer, if the program need not be asked again.
    fn get(&self, asked: &Asked, oldest: Duration) -> Option<ProbeResult> {
        let (at, answer) = self.0.get(asked)?;
        let lasts = if answer.is_ok() { oldest } else { FAILURE_LASTS };
        (at.elapsed() <= lasts).then(|| answer.clone())
    }

    /// Keeps an answer, and returns what counts from now on: a later failure does not replace an earlier
    /// success.
    fn keep(&mut self, asked: Asked, answer: ProbeResult, took: Duration) -> ProbeResult {
        if let (Err(error), Some((_, Ok(offer)))) = (&answer, self.0.get(&asked)) {
            warn!(program = %asked.program.display(), %error, "what it answered before still counts");
            return Ok(Arc::clone(offer));
        }
        if answer.is_err() && took < LONG {
            return answer;
        }
        // The program may have been replaced by another one.
        self.0.retain(|other, _| (&other.program, other.accelerator) != (&asked.program, asked.accelerator));
        self.0.insert(asked, (Instant::now(), answer.clone()));
        answer
    }
}

/// What this node's programs can do, as far as they were asked.
pub(super) struct Preflight {
    twin_programs: Vec<PathBuf>,
    prober: Prober,
    /// An empty folder.
    no_folder: PathBuf,
    /// Held while a program is asked: one at a time.
    answers: Arc<Mutex<Answers>>,
}

impl Preflight {
    pub(super) fn new(config: &NodeConfig) -> Self {
        let prober = Prober {
            launcher: launcher(),
            cgroup_root: config.cgroup_root.clone(),
            // Twins' names have a dot.
            cgroup_name: "probe".to_owned(),
            run_dir: config.run_dir.clone(),
            limit: PROBE_LIMIT,
        };
        let no_folder = config.run_dir.join("empty");
        Self { twin_programs: config.twin_programs.clone(), prober, no_folder, answers: Arc::default() }
    }

    /// Ends a QEMU that an agent has left over that was killed while it asked.
    pub(super) async fn clear(&self) {
        if let Err(error) = self.prober.clear().await {
            warn!(%error, "a QEMU that an earlier agent has started for preflight only could not be cleared away");
        }
    }

    /// Asks the program that a reservation is about, if it was not asked before. [`Preflight::check`] uses
    /// the answer.
    pub(super) async fn get_ready(&self, given: &ReserveRequest) {
        let Ok(json) = vm::parse(&given.vm_json) else { return };
        let Some(qemu) = given.qemu.as_ref().filter(|_| json.vmm.kind == VmmKind::Qemu) else { return };
        if json.require_allowed(&self.twin_programs).is_ok() {
            let accelerator = usable(from_proto(qemu).accelerator, no_kvm().as_deref());
            let _ = self.offer(&json.twin.program, accelerator, Duration::MAX).await;
        }
    }

    /// Refuses a reservation whose twin could not take the VM over. The caller has checked that its program
    /// is allowed.
    pub(super) async fn check(&self, given: &ReserveRequest, plan: &TwinPlan) -> Result<(), Refusal> {
        if plan.vmm.kind != VmmKind::Qemu {
            return Ok(());
        }
        let mut verdict = self.judge(given, plan, Duration::MAX).await;
        if verdict.findings.iter().any(|finding| finding.kind != Kind::FileMissing) {
            // What was known may be out of date: a module may have been loaded since, or microcode.
            verdict = self.judge(given, plan, FRESH).await;
        }
        verdict.findings.extend(self.confined(plan).await?);
        verdict.findings.sort_by_key(|finding| finding.kind);
        for what in &verdict.not_compared {
            warn!(vm = plan.cgroup_name, "not compared before the twin is started: {what}");
        }
        match verdict.refusal() {
            Some((kind, message)) => Err(Refusal::precondition(Reason::Other(kind.as_str().into()), message)),
            None => Ok(()),
        }
    }

    /// What the twin asks for and cannot have in its sandbox.
    async fn confined(&self, plan: &TwinPlan) -> Result<Vec<Finding>, Refusal> {
        let Some(sandbox) = &plan.sandbox else { return Ok(Vec::new()) };
        let devices: Vec<String> = plan.device_names.clone();
        let given = plan.arguments.len().saturating_sub(QEMU_SANDBOX.len());
        let given = plan.arguments.get(..given).unwrap_or_default();
        let mut findings = confined::findings(given, sandbox, &devices);
        let files = files::outside(&files::in_arguments(given), &plan.directory);
        if files.is_empty() {
            return Ok(findings);
        }
        let failed = |error: &dyn std::fmt::Display| {
            let message = format!("what the twin would see cannot be found out: {error}");
            Refusal::precondition(ServiceReason::TwinNotConfined, message)
        };
        // The twin's own folder is not there yet.
        Folder::make(&self.no_folder, None).map_err(|error| failed(&error))?;
        let empty = Sandbox { directory: self.no_folder.clone(), ..sandbox.clone() };
        let paths: Vec<PathBuf> = files.iter().map(|(_, path)| path.clone()).collect();
        let reached = check(&plan.launcher, &empty, &paths).await.map_err(|error| failed(&error))?;
        for ((index, path), reach) in files.into_iter().zip(reached) {
            if reach != Reach::Readable {
                findings.push(confined::unreachable(index, &path, sandbox, reach == Reach::Denied));
            }
        }
        Ok(findings)
    }

    async fn judge(&self, given: &ReserveRequest, plan: &TwinPlan, oldest: Duration) -> Verdict {
        let mut verdict = match &given.qemu {
            Some(qemu) => {
                let facts = from_proto(qemu);
                let no_kvm = no_kvm();
                let accelerator = usable(facts.accelerator, no_kvm.as_deref());
                let offer = self.offer(&plan.program, accelerator, oldest).await.map(|offer| {
                    // Another accelerator's features say nothing.
                    let comparable = facts.accelerator == Some(accelerator);
                    Offer {
                        cpu_features: offer.cpu_features.clone().filter(|_| comparable),
                        ..(*offer).clone()
                    }
                });
                let (program, why) = (plan.program.display().to_string(), no_kvm.as_deref());
                let offer = offer.as_ref().map_err(|NotAsked(why)| why.as_str());
                compare(&facts, offer, &program, &plan.arguments, why)
            }
            None => {
                let nothing = "version, machine type and CPU: the source's agent has not described its QEMU";
                Verdict { not_compared: vec![nothing.to_owned()], ..Verdict::default() }
            }
        };
        verdict.findings.extend(files::missing(&files::in_arguments(&plan.arguments), &plan.directory));
        verdict
    }

    /// What the program has answered, if that is not older than `oldest`; otherwise what it answers now.
    async fn offer(&self, program: &Path, accelerator: Accelerator, oldest: Duration) -> ProbeResult {
        let metadata =
            fs::metadata(program).map_err(|error| NotAsked(format!("{}: {error}", program.display())))?;
        let asked = Asked {
            program: program.to_owned(),
            length_bytes: metadata.len(),
            modified: metadata.modified().ok(),
            accelerator,
        };
        let (prober, answers) = (self.prober.clone(), Arc::clone(&self.answers));
        // The caller may go away; what was started is cleared away all the same.
        let asking = tokio::spawn(async move {
            let mut answers = answers.lock().await;
            if let Some(answer) = answers.get(&asked, oldest) {
                return answer;
            }
            let began = Instant::now();
            let answer = prober.ask(&asked.program, accelerator).await;
            let answer = answer.map(Arc::new).map_err(|error| NotAsked(error.to_string()));
            let took = began.elapsed();
            if let Ok(offer) = &answer {
                let features = offer.cpu_features.as_ref().map(|features| features.len());
                let (program, version) = (asked.program.display(), &offer.version);
                info!(%program, ?accelerator, version, features, ?took, "a QEMU has said what it can do");
            }
            answers.keep(asked, answer, took)
        });
        asking.await.map_err(|error| NotAsked(error.to_string()))?
    }
}

/// What a QEMU of this node is asked about. Without KVM: only what does not depend on it.
fn usable(wanted: Option<Accelerator>, no_kvm: Option<&str>) -> Accelerator {
    match wanted {
        Some(Accelerator::Kvm) if no_kvm.is_none() => Accelerator::Kvm,
        _ => Accelerator::Tcg,
    }
}

/// Why there is no KVM; None if there is. To open it does nothing.
fn no_kvm() -> Option<String> {
    OpenOptions::new().read(true).write(true).open(KVM).err().map(|error| error.to_string())
}

/// For the operator, which passes it on to a destination.
pub(super) fn to_proto(facts: &Facts) -> QemuDescription {
    QemuDescription {
        version: facts.version.clone(),
        package: facts.package.clone(),
        machine_type: facts.machine_type.clone(),
        accelerator: facts.accelerator.map(Accelerator::as_str).unwrap_or_default().to_owned(),
        cpu_features: facts.cpu_features.iter().cloned().collect(),
    }
}

fn from_proto(qemu: &QemuDescription) -> Facts {
    Facts {
        version: qemu.version.clone(),
        package: qemu.package.clone(),
        machine_type: qemu.machine_type.clone(),
        accelerator: qemu.accelerator.parse().ok(),
        cpu_features: qemu.cpu_features.iter().cloned().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_read_from_the_wire_as_they_were_found() {
        for accelerator in [Some(Accelerator::Kvm), Some(Accelerator::Tcg), None] {
            let facts = Facts {
                version: "10.0.2".to_owned(),
                package: "Debian".to_owned(),
                machine_type: "pc-q35-10.0".to_owned(),
                accelerator,
                cpu_features: ["avx", "sse2"].map(str::to_owned).into(),
            };
            assert_eq!(from_proto(&to_proto(&facts)), facts);
        }
    }

    #[test]
    fn a_program_that_could_not_be_asked_is_not_tried_again_for_a_while_unless_another_replaces_it() {
        let asked = |length_bytes| Asked {
            program: "/bin/qemu".into(),
            length_bytes,
            modified: None,
            accelerator: Accelerator::Tcg,
        };
        let mut answers = Answers::default();
        assert_eq!(answers.get(&asked(1), Duration::MAX), None);
        let failed = || Err(NotAsked("it did not answer".to_owned()));
        answers.keep(asked(1), failed(), LONG / 2).unwrap_err();
        assert_eq!(answers.get(&asked(1), Duration::MAX), None, "it may be asked again");
        answers.keep(asked(1), failed(), LONG).unwrap_err();
        assert_eq!(answers.get(&asked(1), Duration::ZERO), Some(failed()));
        assert_eq!(answers.get(&asked(2), Duration::MAX), None);

        answers.keep(asked(2), Ok(Arc::new(Offer::default())), Duration::ZERO).unwrap();
        assert_eq!(answers.get(&asked(1), Duration::MAX), None, "it is gone");
        assert!(answers.get(&asked(2), Duration::MAX).is_some());
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(answers.get(&asked(2), Duration::from_millis(1)), None);
        answers.keep(asked(2), failed(), LONG).expect("what it answered before counts");
        assert!(answers.get(&asked(2), Duration::MAX).unwrap().is_ok());
    }

    #[test]
    fn without_kvm_only_what_does_not_depend_on_it_is_asked() {
        assert_eq!(usable(Some(Accelerator::Kvm), None), Accelerator::Kvm);
        assert_eq!(usable(Some(Accelerator::Kvm), Some("gone")), Accelerator::Tcg);
        assert_eq!(usable(Some(Accelerator::Tcg), None), Accelerator::Tcg);
        assert_eq!(usable(None, None), Accelerator::Tcg);
    }
}
