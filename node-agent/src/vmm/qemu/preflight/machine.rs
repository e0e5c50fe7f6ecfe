//! The machine type that a twin's arguments ask for.

use super::MachineType;

/// The value of the last `-machine` or `-M`: QEMU uses that one. None: its default.
pub(super) fn asked_for(arguments: &[String]) -> Option<(usize, &str)> {
    let mut found = None;
    for (index, pair) in arguments.windows(2).enumerate() {
        let [option, value] = pair else { continue };
        if !matches!(option.as_str(), "-machine" | "--machine" | "-M" | "--M") {
            continue;
        }
        for (number, part) in value.split(',').enumerate() {
            match part.split_once('=') {
                Some(("type", name)) => found = Some((index + 1, name)),
                Some(_) => {}
                // QEMU takes the first word for `type`.
                None if number == 0 && !part.is_empty() => found = Some((index + 1, part)),
                None => {}
            }
        }
    }
    found
}

/// The machine type of a name, or of none, at a QEMU.
pub(super) fn resolve<'a>(name: Option<&str>, machines: &'a [MachineType]) -> Option<&'a str> {
    let is = |machine: &&MachineType| match name {
        Some(name) => machine.name == name || machine.alias.as_deref() == Some(name),
        None => machine.is_default,
    };
    machines.iter().find(is).map(|machine| machine.name.as_str())
}

/// The newest type of the same family: `pc-q35-9.2` for `pc-q35-10.0`.
pub(super) fn newest_of_family<'a>(name: &str, machines: &'a [MachineType]) -> Option<&'a str> {
    let (family, _) = versioned(name)?;
    let of_family = |machine: &'a MachineType| {
        let (other, version) = versioned(&machine.name)?;
        (other == family).then_some((version, machine.name.as_str()))
    };
    machines.iter().filter_map(of_family).max().map(|(_, name)| name)
}

/// `pc-q35-10.0` is of the family `pc-q35`, in version 10.0.
fn versioned(name: &str) -> Option<(&str, (u32, u32))> {
    let (family, version) = name.rsplit_once('-')?;
    Some((family, super::version::release(version)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machines() -> Vec<MachineType> {
        let of = |name: &str| MachineType { name: name.to_owned(), ..MachineType::default() };
        vec![
            of("pc-q35-9.2"),
            of("pc-q35-10.0"),
            of("pc-q35-2.12"),
            MachineType { alias: Some("pc".to_owned()), is_default: true, ..of("pc-i440fx-10.0") },
            of("none"),
        ]
    }

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn the_last_machine_option_counts() {
        for (arguments, expected) in [
            ("-S -machine pc-q35-10.0,accel=kvm", Some((2, "pc-q35-10.0"))),
            ("-M q35", Some((1, "q35"))),
            ("-machine accel=kvm,type=q35", Some((1, "q35"))),
            ("-machine q35 -machine accel=tcg", Some((1, "q35"))),
            ("-machine q35 -M pc", Some((3, "pc"))),
            ("-m 32", None),
            ("-machine", None),
            ("-machine accel=kvm", None),
        ] {
            assert_eq!(asked_for(&words(arguments)), expected, "{arguments}");
        }
    }

    #[test]
    fn a_name_an_alias_and_no_name_resolve_to_a_type() {
        let machines = machines();
        assert_eq!(resolve(Some("pc-q35-9.2"), &machines), Some("pc-q35-9.2"));
        assert_eq!(resolve(Some("pc"), &machines), Some("pc-i440fx-10.0"));
        assert_eq!(resolve(None, &machines), Some("pc-i440fx-10.0"));
        assert_eq!(resolve(Some("virt"), &machines), None);
        assert_eq!(resolve(None, &[]), None);
    }

    #[test]
    fn the_newest_of_a_family_is_found_by_number() {
        let machines = machines();
        assert_eq!(newest_of_family("pc-q35-11.1", &machines), Some("pc-q35-10.0"));
        assert_eq!(newest_of_family("virt-10.0", &machines), None);
        assert_eq!(newest_of_family("none", &machines), None);
    }
}
