//! The comparison. Pure.

use super::version::release;
use super::{Accelerator, Facts, Finding, Kind, Offer, Verdict, machine};

/// The most missing features that a message names.
const NAMED_FEATURES: usize = 32;

/// Compares the QEMU of a destination with the QEMU of a VM.
///
/// `program` and `arguments` are the twin's, `no_kvm` is the reason if there is no KVM. `offer` is the
/// reason if the program could not be queried.
pub fn compare(
    facts: &Facts,
    offer: Result<&Offer, &str>,
    program: &str,
    arguments: &[String],
    no_kvm: Option<&str>,
) -> Verdict {
    let mut verdict = Verdict::default();
    match offer {
        Ok(offer) => {
            versions(facts, offer, program, &mut verdict);
            machines(facts, offer, program, arguments, &mut verdict);
        }
        Err(why) => verdict.not_compared.push(format!("version, machine type and CPU: {why}")),
    }
    match (facts.accelerator, no_kvm) {
        (Some(Accelerator::Kvm), Some(why)) => {
            let message = format!(
                "the VM runs under KVM, and /dev/kvm cannot be used there: {why}. Load kvm_intel or kvm_amd, or \
                 let the agent's \
                 user use it"
            );
            verdict.findings.push(Finding::new(Kind::AcceleratorMissing, message));
        }
        (None, _) => {
            verdict
                .not_compared
                .push("the CPU: the target's agent does not know the source's accelerator".to_owned());
        }
        _ => {}
    }
    if let Ok(offer) = offer {
        features(facts, offer, &mut verdict);
    }
    verdict
}

fn versions(facts: &Facts, offer: &Offer, program: &str, verdict: &mut Verdict) {
    let (source, here) = (&facts.version, &offer.version);
    match (release(source), release(here)) {
        (Some(theirs), Some(ours)) if ours < theirs => {
            let package =
                if facts.package.is_empty() { String::new() } else { format!(" ({})", facts.package) };
            let (major, minor) = theirs;
            let message = format!(
                "{program} is QEMU {here} there, and the VM runs under QEMU {source}{package}: an older QEMU \
                 cannot load what a newer \
                 one has saved. Install QEMU {major}.{minor} or newer there"
            );
            verdict.findings.push(Finding::new(Kind::QemuOlder, message));
        }
        (Some(_), Some(_)) => {}
        _ => verdict.not_compared.push(format!(
            "the version: QEMU's is {source:?} at the source and {here:?} at the target, and one of them does not \
             begin with \
             MAJOR.MINOR"
        )),
    }
}

fn machines(facts: &Facts, offer: &Offer, program: &str, arguments: &[String], verdict: &mut Verdict) {
    let wanted = &facts.machine_type;
    if wanted.is_empty() || offer.machines.is_empty() {
        verdict.not_compared.push("the machine type: QEMU does not report it".to_owned());
        return;
    }
    if !offer.machines.iter().any(|machine| machine.name == *wanted) {
        let newest = machine::newest_of_family(wanted, &offer.machines);
        let newest =
            newest.map(|name| format!("; the newest of its kind there is {name}")).unwrap_or_default();
        let message = format!(
            "the VM's machine type is {wanted}, and {program} (QEMU {}) does not know it there{newest}",
            offer.version
        );
        verdict.findings.push(Finding::new(Kind::MachineTypeUnknown, message));
        return;
    }
    let asked = machine::asked_for(arguments);
    let name = asked.map(|(_, name)| name);
    let (Some(twins), what) = (
        machine::resolve(name, &offer.machines),
        asked.map_or("twin.args name no machine, which".to_owned(), |(index, name)| {
            format!("twin.args[{index}] asks for the machine {name}, which")
        }),
    ) else {
        let named = name.unwrap_or("its default");
        let message = format!("twin.args ask for the machine {named}, and {program} does not know it there");
        verdict.findings.push(Finding::new(Kind::MachineTypeUnknown, message));
        return;
    };
    if twins != wanted {
        let message = format!(
            "{what} is {twins} there, and the VM's machine type is {wanted}: write `-machine {wanted}` in vm.json"
        );
        verdict.findings.push(Finding::new(Kind::MachineTypeDiffers, message));
    }
}

fn features(facts: &Facts, offer: &Offer, verdict: &mut Verdict) {
    let (Some(accelerator), Some(offered)) = (facts.accelerator, &offer.cpu_features) else { return };
    let missing: Vec<&str> = facts.cpu_features.difference(offered).map(String::as_str).collect();
    if missing.is_empty() {
        return;
    }
    let named = missing.get(..NAMED_FEATURES).unwrap_or(&missing).join(", ");
    let more = missing.len().saturating_sub(NAMED_FEATURES);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let (count, s) = (missing.len(), if missing.len() == 1 { "" } else { "s" });
    let message = format!(
        "the guest sees {count} CPU feature{s} that cannot be had there under {}: {named}{more}. Choose a target \
         whose CPU has \
         them, or start the VM with a CPU model that both have",
        accelerator.as_str()
    );
    verdict.findings.push(Finding::new(Kind::CpuFeaturesMissing, message));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::qemu::preflight::MachineType;

    const PROGRAM: &str = "/usr/bin/qemu";

    fn features(names: &[&str]) -> std::collections::BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn facts() -> Facts {
        Facts {
            version: "10.0.2".to_owned(),
            package: "Debian 1:10.0.2".to_owned(),
            machine_type: "pc-q35-10.0".to_owned(),
            accelerator: Some(Accelerator::Kvm),
            cpu_features: features(&["avx2", "sse2"]),
        }
    }

    fn machine(name: &str, alias: Option<&str>) -> MachineType {
        MachineType { name: name.to_owned(), alias: alias.map(str::to_owned), is_default: false }
    }

    fn offer() -> Offer {
        Offer {
            version: "10.0.2".to_owned(),
            machines: vec![machine("pc-q35-9.2", None), machine("pc-q35-10.0", Some("q35"))],
            cpu_features: Some(features(&["avx2", "sse2", "avx512f"])),
        }
    }

    fn q35() -> Vec<String> {
        ["-machine", "q35,accel=kvm"].map(str::to_owned).to_vec()
    }

    fn judge(facts: &Facts, offer: &Offer) -> Verdict {
        compare(facts, Ok(offer), PROGRAM, &q35(), None)
    }

    /// The only finding.
    fn only(verdict: &Verdict) -> (Kind, &str) {
        match verdict.findings.as_slice() {
            [only] => (only.kind, &only.message),
            other => panic!("{other:#?}"),
        }
    }

    #[test]
    fn between_identical_nodes_nothing_is_found() {
        let same = Offer { cpu_features: Some(facts().cpu_features), ..offer() };
        assert_eq!(judge(&facts(), &same), Verdict::default());
    }

    #[test]
    fn a_newer_qemu_and_an_older_micro_are_accepted_and_an_older_minor_is_not() {
        for version in ["10.0.0", "10.0.50", "10.1.0", "11.0.0", "10.0-rc1"] {
            let other = Offer { version: version.to_owned(), ..offer() };
            assert_eq!(judge(&facts(), &other), Verdict::default(), "{version}");
        }
        for version in ["9.2.4", "9.99.99", "8.0.0"] {
            let other = Offer { version: version.to_owned(), ..offer() };
            let verdict = judge(&facts(), &other);
            let (kind, message) = only(&verdict);
            assert_eq!(kind, Kind::QemuOlder);
            assert_eq!(
                message,
                format!(
                    "/usr/bin/qemu is QEMU {version} there, and the VM runs under QEMU 10.0.2 (Debian 1:10.0.2): \
                     an older QEMU \
                     cannot load what a newer one has saved. Install QEMU 10.0 or newer there"
                )
            );
        }
    }

    #[test]
    fn a_version_that_cannot_be_compared_is_reported_and_does_not_prevent_a_migration() {
        for (source, here) in [("acme 7", "10.0.2"), ("10.0.2", ""), ("x", "y")] {
            let other = Offer { version: here.to_owned(), ..offer() };
            let verdict = judge(&Facts { version: source.to_owned(), ..facts() }, &other);
            assert_eq!(verdict.findings, []);
            assert_eq!(
                verdict.not_compared,
                [format!(
                    "the version: QEMU's is {source:?} at the source and {here:?} at the target, and one of them \
                     does not begin with \
                     MAJOR.MINOR"
                )]
            );
        }
    }

    #[test]
    fn an_unknown_machine_type_is_named_with_the_nearest() {
        let verdict = judge(&Facts { machine_type: "pc-q35-10.1".to_owned(), ..facts() }, &offer());
        assert_eq!(
            only(&verdict),
            (
                Kind::MachineTypeUnknown,
                "the VM's machine type is pc-q35-10.1, and /usr/bin/qemu (QEMU 10.0.2) does not know it there; the \
                 newest of its \
                 kind there is pc-q35-10.0"
            )
        );
        let verdict = judge(&Facts { machine_type: "acme".to_owned(), ..facts() }, &offer());
        assert!(only(&verdict).1.ends_with("does not know it there"), "{verdict:?}");
    }

    #[test]
    fn an_alias_for_another_type_at_the_destination_is_reported() {
        let verdict = judge(&Facts { machine_type: "pc-q35-9.2".to_owned(), ..facts() }, &offer());
        assert_eq!(
            only(&verdict),
            (
                Kind::MachineTypeDiffers,
                "twin.args[1] asks for the machine q35, which is pc-q35-10.0 there, and the VM's machine type is \
                 pc-q35-9.2: write \
                 `-machine pc-q35-9.2` in vm.json"
            )
        );
        let unknown = ["-machine".to_owned(), "virt".to_owned()];
        let verdict = compare(&facts(), Ok(&offer()), PROGRAM, &unknown, None);
        assert_eq!(only(&verdict).0, Kind::MachineTypeUnknown);
        // No default is known, and none is asked for.
        assert_eq!(only(&compare(&facts(), Ok(&offer()), PROGRAM, &[], None)).0, Kind::MachineTypeUnknown);
    }

    #[test]
    fn missing_features_are_all_named_up_to_a_bound() {
        let source = Facts { cpu_features: features(&["avx2", "sse2", "vaes", "gfni"]), ..facts() };
        assert_eq!(
            only(&judge(&source, &offer())),
            (
                Kind::CpuFeaturesMissing,
                "the guest sees 2 CPU features that cannot be had there under kvm: gfni, vaes. Choose a target \
                 whose CPU has them, \
                 or start the VM with a CPU model that both have"
            )
        );
        let many: Vec<String> = (0..40).map(|number| format!("f{number:02}")).collect();
        let source = Facts { cpu_features: many.into_iter().collect(), ..facts() };
        let verdict = judge(&source, &offer());
        let message = only(&verdict).1;
        assert!(message.contains("40 CPU features") && message.contains("f31 and 8 more."), "{message}");
        assert!(!message.contains("f32"), "{message}");
    }

    #[test]
    fn without_kvm_that_is_reported_and_features_are_not() {
        let none = Offer { cpu_features: None, ..offer() };
        let verdict = compare(&facts(), Ok(&none), PROGRAM, &q35(), Some("Permission denied (os error 13)"));
        assert_eq!(
            only(&verdict),
            (
                Kind::AcceleratorMissing,
                "the VM runs under KVM, and /dev/kvm cannot be used there: Permission denied (os error 13). Load \
                 kvm_intel or kvm_amd, or \
                 let the agent's user use it"
            )
        );
        let emulated = Facts { accelerator: Some(Accelerator::Tcg), ..facts() };
        assert_eq!(compare(&emulated, Ok(&offer()), PROGRAM, &q35(), Some("gone")), Verdict::default());
    }

    #[test]
    fn everything_is_reported_at_once_and_the_gravest_first() {
        let source =
            Facts { cpu_features: features(&["gfni"]), machine_type: "pc-q35-11.0".to_owned(), ..facts() };
        let old = Offer { version: "9.1.0".to_owned(), ..offer() };
        let kinds: Vec<Kind> =
            compare(&source, Ok(&old), PROGRAM, &q35(), Some("x")).findings.iter().map(|f| f.kind).collect();
        assert_eq!(
            kinds,
            [Kind::QemuOlder, Kind::MachineTypeUnknown, Kind::AcceleratorMissing, Kind::CpuFeaturesMissing]
        );
    }

    #[test]
    fn a_program_that_could_not_be_queried_is_reported_and_does_not_prevent_a_migration() {
        let verdict = compare(&facts(), Err("it ended"), PROGRAM, &q35(), None);
        assert_eq!(verdict.findings, []);
        assert_eq!(verdict.not_compared, ["version, machine type and CPU: it ended"]);
    }
}
