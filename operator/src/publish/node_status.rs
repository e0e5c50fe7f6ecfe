//! The status of a MigrationNode.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use slackwater_api::condition::{CERTIFICATE_VALID, READY, REPORT_ACCEPTED};
use slackwater_api::{MigrationNodeStatus, NodeDevice};

use super::count;
use crate::conditions::{self, Finding, Stamp, Status};
use crate::inventory::{Certificate, Device, DeviceFeatures, Link, Node, VmKey};
use crate::reason::{EPOCH_TOO_HIGH, REPORT_CUT, VM_NAME_TAKEN};

/// How many names a message lists before it only counts them.
const LISTED: usize = 5;

/// What the status should be. The last report of a node that does not answer stays.
/// `set_aside`: VMs that it reports, with the nodes that are known to have them.
pub(super) fn node_status(
    node: &Node,
    set_aside: Option<&BTreeMap<VmKey, String>>,
    previous: &[Condition],
    stamp: Stamp,
) -> MigrationNodeStatus {
    let mut status = MigrationNodeStatus {
        observed_generation: stamp.generation,
        conditions: previous.to_vec(),
        ..Default::default()
    };
    if let Some(report) = &node.report {
        status.agent_version = unless_empty(&report.agent_version);
        status.kernel_release = unless_empty(&report.kernel_release);
        status.boot_id = unless_empty(&report.boot_id);
        status.vm_count = Some(count(report.vms.len()));
        status.device_count = Some(count(report.devices.len()));
        status.free_device_count = Some(count(report.devices.values().filter(|device| device.free).count()));
        status.devices = report.devices.iter().map(|(name, device)| node_device(name, device)).collect();
    }
    conditions::set(&mut status.conditions, READY, &ready(node), stamp);
    if let Some(report) = &node.report {
        let accepted = report_accepted(&report.ignored, set_aside);
        conditions::set(&mut status.conditions, REPORT_ACCEPTED, &accepted, stamp);
        if let Some(certificate) = &report.certificate {
            let finding = certificate_valid(certificate, stamp.now);
            conditions::set(&mut status.conditions, CERTIFICATE_VALID, &finding, stamp);
        }
    }
    status
}

/// Whether all that the agent reports is used.
fn report_accepted(ignored: &[String], set_aside: Option<&BTreeMap<VmKey, String>>) -> Finding {
    let taken = set_aside.into_iter().flatten();
    let taken: Vec<String> = taken.map(|(vm, home)| format!("{vm} (known on {home})")).collect();
    let reason = match (taken.is_empty(), ignored.is_empty()) {
        (true, true) => return Finding::new(Status::True, "AllUsed", "All that the agent reports is used."),
        (false, _) => VM_NAME_TAKEN,
        (true, false) => REPORT_CUT,
    };
    let mut sentences = Vec::new();
    if !taken.is_empty() {
        sentences.push(format!(
            "Reports of VMs that are known to be on another node are set aside: {}. End the copy that is not the VM",
            some_of(&taken, ", ")
        ));
    }
    if !ignored.is_empty() {
        sentences.push(some_of(ignored, "; "));
    }
    Finding::new(Status::False, reason, format!("{}.", sentences.join(". ")))
}

/// The first of many, and how many more there are.
fn some_of(items: &[String], separator: &str) -> String {
    let mut shown: Vec<String> = items.iter().take(LISTED).cloned().collect();
    if items.len() > LISTED {
        shown.push(format!("{} more", items.len() - LISTED));
    }
    shown.join(separator)
}

fn ready(node: &Node) -> Finding {
    match &node.link {
        Link::Connecting => {
            let message = format!("The agent at {} has not answered yet.", node.address);
            Finding::new(Status::Unknown, "Connecting", message)
        }
        Link::Down { reason, error } => {
            let error = error.trim_end_matches('.');
            let last = if node.report.is_some() { " What is shown here is its last report." } else { "" };
            let message = format!("The agent does not answer: {error}.{last}");
            Finding::new(Status::False, *reason, message)
        }
        Link::Ready if node.epoch_claim.is_some() => {
            let claim = node.not_ready_reason().unwrap_or_default();
            let message = format!("The agent at {} answers, and is set aside: {claim}.", node.address);
            Finding::new(Status::False, EPOCH_TOO_HIGH, message)
        }
        Link::Ready => {
            let message = format!("The agent at {} answers.", node.address);
            Finding::new(Status::True, "AgentAnswers", message)
        }
    }
}

/// What the agent has said of its certificate last. The agent tells when it ends soon; that it has ended
/// shows when its connection ends.
fn certificate_valid(certificate: &Certificate, now: Timestamp) -> Finding {
    let Ok(not_after) = Timestamp::from_second(certificate.not_after_unix_s) else {
        let message = format!("The agent says that it ends at {} s.", certificate.not_after_unix_s);
        return Finding::new(Status::Unknown, "Unreadable", message);
    };
    let refused = match certificate.refused.trim_end_matches('.') {
        "" => String::new(),
        why => format!(" The files that the agent should use now are not usable: {why}."),
    };
    let until = format!("The agent's certificate is valid until {not_after}.");
    if now > not_after {
        let message = format!("The agent's certificate has ended at {not_after}.{refused}");
        Finding::new(Status::False, "Expired", message)
    } else if !refused.is_empty() {
        Finding::new(Status::True, "RenewalRefused", format!("{until}{refused}"))
    } else if certificate.ends_soon {
        Finding::new(Status::True, "EndsSoon", format!("{until} It should have been renewed by now."))
    } else {
        Finding::new(Status::True, "Valid", until)
    }
}

fn unless_empty(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn node_device(name: &str, device: &Device) -> NodeDevice {
    NodeDevice {
        name: name.to_owned(),
        driver: device.driver.clone(),
        model: device.model.clone(),
        features: device.features.known().to_vec(),
        features_unknown_reason: match &device.features {
            DeviceFeatures::Known(_) => None,
            DeviceFeatures::Unknown { reason } => Some(reason.clone()),
        },
        free: device.free,
        holder: unless_empty(&device.holder),
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::epoch::EpochClaim;
    use crate::inventory::NodeReport;

    const STAMP: Stamp = Stamp { generation: Some(2), now: Timestamp::UNIX_EPOCH };

    fn node(link: Link) -> Node {
        let device = |free| Device { driver: "mtty".into(), free, ..Default::default() };
        let devices = BTreeMap::from([("d1".to_owned(), device(true)), ("d2".to_owned(), device(false))]);
        let report = NodeReport { agent_version: "0.1.0".into(), devices, ..Default::default() };
        Node {
            address: "10.0.0.1:7443".into(),
            peer_address: "10.0.0.1:7443".into(),
            link,
            report: Some(std::sync::Arc::new(report)),
            ..Default::default()
        }
    }

    #[test]
    fn a_node_that_answers_is_ready_and_its_devices_are_counted() {
        let status = node_status(&node(Link::Ready), None, &[], STAMP);
        assert_eq!((status.device_count, status.free_device_count), (Some(2), Some(1)));
        assert_eq!(status.agent_version.as_deref(), Some("0.1.0"));
        assert!(conditions::is(&status.conditions, READY, Status::True));
        assert_eq!(status.kernel_release, None);
    }

    #[test]
    fn the_end_of_the_agents_certificate_is_said_before_and_after_it() {
        let judge = |second: i64, ends_soon, refused: &str| {
            let mut node = node(Link::Ready);
            let certificate = Certificate { not_after_unix_s: 1000, ends_soon, refused: refused.to_owned() };
            std::sync::Arc::make_mut(node.report.as_mut().unwrap()).certificate = Some(certificate);
            let stamp = Stamp { generation: None, now: Timestamp::from_second(second).unwrap() };
            let status = node_status(&node, None, &[], stamp);
            let found = conditions::find(&status.conditions, CERTIFICATE_VALID).unwrap().clone();
            (found.status, found.reason, found.message)
        };
        let until = "The agent's certificate is valid until 1970-01-01T00:16:40Z.";
        assert_eq!(judge(1, false, ""), ("True".into(), "Valid".into(), until.into()));
        let (status, reason, message) = judge(1, true, "");
        assert_eq!((status.as_str(), reason.as_str()), ("True", "EndsSoon"));
        assert_eq!(message, format!("{until} It should have been renewed by now."));
        let (status, reason, message) = judge(1, true, "the key does not fit.");
        assert_eq!((status.as_str(), reason.as_str()), ("True", "RenewalRefused"));
        let why = "The files that the agent should use now are not usable: the key does not fit.";
        assert_eq!(message, format!("{until} {why}"));
        let (status, reason, message) = judge(1001, true, "");
        assert_eq!((status.as_str(), reason.as_str()), ("False", "Expired"));
        assert_eq!(message, "The agent's certificate has ended at 1970-01-01T00:16:40Z.");
        let older = node_status(&node(Link::Ready), None, &[], STAMP);
        assert_eq!(conditions::find(&older.conditions, CERTIFICATE_VALID), None, "an older agent");
    }

    #[test]
    fn an_agent_that_is_set_aside_is_not_ready_with_both_epochs_and_the_remedy() {
        let claim = Some(EpochClaim { known: 5000, own: 1, limit: 65 });
        let status = node_status(&Node { epoch_claim: claim, ..node(Link::Ready) }, None, &[], STAMP);
        let ready = conditions::find(&status.conditions, READY).unwrap();
        assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "EpochTooHigh"));
        for words in ["epoch 5000", "has 1", "acceptEpochUpTo of this MigrationNode to 5000", "forget-epoch"]
        {
            assert!(ready.message.contains(words), "{}", ready.message);
        }
    }

    #[test]
    fn a_report_that_is_set_aside_or_cut_is_named_with_the_node_that_has_the_vm() {
        let find = |ignored: &[&str], taken: usize| {
            let name = |n| VmKey { namespace: "demo".into(), name: format!("vm-{n}") };
            let taken: BTreeMap<_, _> = (0..taken).map(|n| (name(n), "node-a".to_owned())).collect();
            let mut node = node(Link::Ready);
            std::sync::Arc::make_mut(node.report.as_mut().unwrap()).ignored =
                ignored.iter().map(|text| (*text).to_owned()).collect();
            let status = node_status(&node, Some(&taken), &[], STAMP);
            let found = conditions::find(&status.conditions, REPORT_ACCEPTED).unwrap().clone();
            (found.status, found.reason, found.message)
        };
        let is = |(status, reason, _): &(String, String, String)| (status.clone(), reason.clone());
        assert_eq!(is(&find(&[], 0)), ("True".into(), "AllUsed".into()));
        let cut = find(&["two VMs are left out"], 0);
        assert_eq!(is(&cut), ("False".into(), "ReportCut".into()));
        assert_eq!(cut.2, "two VMs are left out.");
        let taken = find(&["x"], 7);
        assert_eq!(is(&taken), ("False".into(), "VMNameTaken".into()));
        assert!(
            taken.2.contains("demo/vm-0 (known on node-a), ") && taken.2.contains("2 more"),
            "{}",
            taken.2
        );
    }

    #[test]
    fn a_silent_node_is_not_ready_with_a_message_and_keeps_its_last_report() {
        let status = node_status(
            &node(Link::Down { reason: "AgentUnreachable", error: "connection refused".into() }),
            None,
            &[],
            STAMP,
        );
        let ready = conditions::find(&status.conditions, READY).unwrap();
        assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "AgentUnreachable"));
        assert_eq!(
            ready.message,
            "The agent does not answer: connection refused. What is shown here is its last report."
        );
        assert_eq!(status.device_count, Some(2));
    }
}
