use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::devices::Device;
use super::super::placeholders::{TwinCommand, twin_arguments};
use super::*;
use crate::process::exec::Descriptor;

fn good() -> Value {
    json!({
        "name": "counter", "namespace": "demo",
        "vmm": {"kind": "contract", "socket": "vmm.sock"},
        "twin": {"program": "/bin/vmm", "args": ["run", "--socket", "{socket}", "--device", "{device.0.cdev}",
            "{device.1.name}={device.1.cdev}", "{{\"a\":1}}"]}
    })
}

/// The error of the good file with one value changed.
fn error_with(pointer: &str, value: Value) -> String {
    let mut vm = good();
    *vm.pointer_mut(pointer).unwrap() = value;
    parse(&vm.to_string()).unwrap_err().to_string()
}

fn device(name: &str, number: u32) -> Device {
    Device {
        name: name.to_owned(),
        sysfs: PathBuf::from(format!("/sys/bus/mdev/devices/{name}")),
        cdev: PathBuf::from(format!("/dev/vfio/devices/vfio{number}")),
        group: None,
        driver: "mtty".to_owned(),
        model: "mtty-1".to_owned(),
    }
}

#[test]
fn a_good_file_gives_the_twins_command_line_with_the_destinations_devices() {
    let vm = parse(&good().to_string()).unwrap();
    assert_eq!(vm.directory_name(), "demo.counter");
    let socket = vm.socket_in(Path::new("/run/slackwater/vms/demo.counter")).unwrap();
    assert_eq!(socket, Path::new("/run/slackwater/vms/demo.counter/vmm.sock"));
    let arguments = twin_arguments(&vm, &socket, &[device("uuid-a", 4), device("uuid-b", 2)]).unwrap();
    let expected = [
        "run",
        "--socket",
        "/run/slackwater/vms/demo.counter/vmm.sock",
        "--device",
        "/dev/vfio/devices/vfio4",
        "uuid-b=/dev/vfio/devices/vfio2",
        "{\"a\":1}",
    ];
    assert_eq!(arguments.arguments, expected);
    assert_eq!(arguments.descriptors, []);
}

#[test]
fn a_twin_gets_exactly_the_descriptors_that_its_arguments_name() {
    let mut vm = good();
    let args = json!(["iommufd,fd={iommu.fd}", "fd={device.1.fd}", "again={device.1.fd}", "{device.0.name}"]);
    *vm.pointer_mut("/twin/args").unwrap() = args;
    let vm = parse(&vm.to_string()).unwrap();
    let devices = [device("uuid-a", 4), device("uuid-b", 2)];
    let TwinCommand { arguments, descriptors } = twin_arguments(&vm, Path::new("/s"), &devices).unwrap();
    assert_eq!(arguments, ["iommufd,fd=64", "fd=66", "again=66", "uuid-a"]);
    let open = |number, path: &str| Descriptor { number, path: path.into() };
    assert_eq!(descriptors, [open(64, "/dev/iommu"), open(66, "/dev/vfio/devices/vfio2")]);
    let error = twin_arguments(&vm, Path::new("/s"), &devices[..1]).unwrap_err().to_string();
    assert!(
        error.contains("`twin.args[1]`: `{device.1.fd}` names a device that the VM does not have"),
        "{error}"
    );
}

#[test]
fn a_placeholder_for_a_device_that_the_vm_does_not_have_is_named() {
    let vm = parse(&good().to_string()).unwrap();
    let error = twin_arguments(&vm, Path::new("/s"), &[device("uuid-a", 4)]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "vm.json: field `twin.args[5]`: `{device.1.name}` names a device that the VM does not have: it has 1, \
         counted from 0"
    );
}

#[test]
fn unknown_placeholders_are_named_when_the_file_is_read() {
    for bad in [
        "{Socket}",
        "{}",
        "{device}",
        "{device.0}",
        "{device.x.cdev}",
        "{device.+1.cdev}",
        "{device.01.name}",
        "{device.0.driver}",
        "{device.99999999999999999999.cdev}",
        "{socket",
        "}",
    ] {
        let error = error_with("/twin/args/2", json!(format!("--x={bad}")));
        assert_eq!(
            error,
            format!(
                "vm.json: field `twin.args[2]`: `{bad}` is no placeholder: {{socket}}, {{iommu.fd}}, \
                 {{device.N.cdev}}, \
                {{device.N.fd}}, {{device.N.name}} and {{device.N.sysfs}} are, and a brace itself is written twice"
            )
        );
    }
}

#[test]
fn every_error_names_the_field_its_value_and_what_is_right() {
    for bad in ["", "Counter", "a.b", "-a", "a-", "a_b", &"a".repeat(64)] {
        for field in ["name", "namespace"] {
            let error = error_with(&format!("/{field}"), json!(bad));
            let expected =
                format!("vm.json: field `{field}`: `{bad}` must be a DNS label: 1 to 63 characters");
            assert!(error.starts_with(&expected), "{error}");
        }
    }
    for bad in ["", "../vmm.sock", "a/../b", "./vmm.sock", "a//b", "a/", "/", "a\0b"] {
        let error = error_with("/vmm/socket", json!(bad));
        assert_eq!(
            error,
            format!("vm.json: field `vmm.socket`: `{bad}` must be a path without `.`, `..` and NUL")
        );
    }
    for bad in ["vmm", "", "/bin/../bin/vmm"] {
        let error = error_with("/twin/program", json!(bad));
        assert!(
            error.starts_with(&format!("vm.json: field `twin.program`: `{bad}` must be an absolute path")),
            "{error}"
        );
    }
    assert_eq!(
        error_with("/twin/args/0", json!("a\0")),
        "vm.json: field `twin.args[0]`: `a\\0` must not contain NUL"
    );
    let error = error_with("/vmm/kind", json!("xen"));
    assert!(
        error.starts_with("vm.json: field `vmm.kind`: unknown variant `xen`, expected `contract` or `qemu`"),
        "{error}"
    );
    let error = error_with("/twin/args/1", json!(7));
    assert!(
        error.starts_with("vm.json: field `twin.args[1]`: invalid type: integer `7`, expected a string"),
        "{error}"
    );
    let error = error_with("/vmm", json!({"kind": "contract", "socket": "s", "mode": 1}));
    assert!(
        error.starts_with(
            "vm.json: field `vmm.mode`: unknown field `mode`, expected one of `kind`, `socket`, `devices`"
        ),
        "{error}"
    );
    let error = parse("{}").unwrap_err().to_string();
    assert!(error.starts_with("vm.json: missing field `name`"), "{error}");
    let error = parse(&format!("{} x", good())).unwrap_err().to_string();
    assert!(error.starts_with("vm.json: trailing characters"), "{error}");
    let error = parse(r#"{"name": "a", "name": "b"}"#).unwrap_err().to_string();
    assert!(error.contains("duplicate field `name`"), "{error}");
    assert!(parse("").unwrap_err().to_string().starts_with("vm.json: EOF while parsing"));
}

fn qemu() -> Value {
    json!({
        "name": "web", "namespace": "demo",
        "vmm": {"kind": "qemu", "socket": "qmp.sock", "devices": ["vf0", "vf1"]},
        "twin": {"program": "/bin/qemu", "args": ["-device", "vfio-pci,id=vf0,sysfsdev={device.0.sysfs}",
            "-qmp", "unix:{socket},server=on,wait=off", "-S", "-incoming", "defer"]}
    })
}

#[test]
fn a_qemu_twin_gets_the_folder_of_its_device_in_sysfs() {
    let vm = parse(&qemu().to_string()).unwrap();
    assert_eq!((vm.vmm.kind, vm.vmm.kind.driver()), (VmmKind::Qemu, Driver::Vmm));
    let arguments = twin_arguments(&vm, Path::new("/s"), &[device("uuid-a", 4)]).unwrap();
    assert_eq!(arguments.arguments[1], "vfio-pci,id=vf0,sysfsdev=/sys/bus/mdev/devices/uuid-a");
}

#[test]
fn a_qemu_vm_that_could_not_be_handed_over_is_refused_when_its_file_is_read() {
    let error = |change: fn(&mut Value)| {
        let mut vm = qemu();
        change(&mut vm);
        parse(&vm.to_string()).unwrap_err().to_string()
    };
    let without = |word: &str| {
        let mut vm = qemu();
        vm["twin"]["args"].as_array_mut().unwrap().retain(|argument| argument != word);
        parse(&vm.to_string()).unwrap_err().to_string()
    };
    assert!(without("-S").contains("must have `-S`: the twin must not run before"), "{}", without("-S"));
    assert!(without("defer").contains("must have `-incoming` `defer`"), "{}", without("defer"));
    let socket = without("unix:{socket},server=on,wait=off");
    assert!(socket.contains("must have `-qmp` `unix:{socket}"), "{socket}");
    let none = error(|vm| vm["vmm"]["devices"] = json!([]));
    assert!(none.starts_with("vm.json: field `vmm.devices`: `[]` must name the ids"), "{none}");
    let bad = error(|vm| vm["vmm"]["devices"] = json!(["vf0", "0vf"]));
    assert!(bad.starts_with("vm.json: field `vmm.devices[1]`: `0vf` must be a QEMU id"), "{bad}");
    let twice = error(|vm| vm["vmm"]["devices"] = json!(["vf0", "vf0"]));
    assert_eq!(twice, "vm.json: field `vmm.devices[1]`: `vf0` is named twice");
    let contract = error_with("/vmm", json!({"kind": "contract", "socket": "s", "devices": ["vf0"]}));
    assert!(
        contract.starts_with("vm.json: field `vmm.devices`: `vf0` belongs to a VMM of kind qemu"),
        "{contract}"
    );
}

#[test]
fn a_file_above_the_limit_is_not_parsed() {
    let mut text = good().to_string();
    text.push_str(&" ".repeat(VM_JSON_LIMIT_BYTES - text.len()));
    assert!(parse(&text).is_ok());
    text.push(' ');
    assert_eq!(parse(&text), Err(VmJsonError::TooLarge { bytes: VM_JSON_LIMIT_BYTES + 1 }));
}

#[test]
fn a_socket_path_that_is_too_long_for_the_kernel_is_refused() {
    let vm = parse(&good().to_string()).unwrap();
    let directory = PathBuf::from(format!("/{}", "d".repeat(97)));
    assert_eq!(vm.socket_in(&directory).unwrap().as_os_str().len(), 107);
    let directory = PathBuf::from(format!("/{}", "d".repeat(98)));
    let error = vm.socket_in(&directory).unwrap_err().to_string();
    assert!(error.starts_with("vm.json: field `vmm.socket`: `vmm.sock` becomes /d"), "{error}");
    assert!(error.ends_with("108 bytes: a socket's path has at most 107"), "{error}");
}

#[test]
fn only_allowed_programs_become_twins() {
    let vm = parse(&good().to_string()).unwrap();
    assert_eq!(vm.require_allowed(&["/bin/vmm".into()]), Ok(()));
    let message = |programs: &[PathBuf]| vm.require_allowed(programs).unwrap_err().to_string();
    assert_eq!(
        message(&[]),
        "vm.json: field `twin.program`: /bin/vmm may not be started on this node: the agent was started without \
         --twin-program"
    );
    assert_eq!(
        message(&["/bin/other".into(), "/bin/vmm2".into()]),
        "vm.json: field `twin.program`: /bin/vmm may not be started on this node: --twin-program allows \
         /bin/other, /bin/vmm2"
    );
}

proptest! {
    #[test]
    fn no_input_makes_the_parser_panic(text in ".{0,200}", argument in r"[{}a-z0-9.]{0,40}") {
        let _ = parse(&text);
        let mut vm = good();
        *vm.pointer_mut("/twin/args/0").unwrap() = json!(argument);
        if let Ok(vm) = parse(&vm.to_string()) {
            let _ = twin_arguments(&vm, Path::new("/s"), &[device("a", 0)]);
        }
    }

    #[test]
    fn text_with_doubled_braces_is_unchanged(text in r"[{}a-z ]{0,40}") {
        let mut vm = good();
        *vm.pointer_mut("/twin/args").unwrap() = json!([text.replace('{', "{{").replace('}', "}}")]);
        let vm = parse(&vm.to_string()).unwrap();
        prop_assert_eq!(twin_arguments(&vm, Path::new("/s"), &[]).unwrap().arguments, vec![text]);
    }
}

#[test]
fn a_twins_socket_lies_in_its_folder_whatever_the_source_says() {
    let directory = Path::new("/run/slackwater/vms/demo.counter");
    let socket = |socket: &str| {
        let mut vm = good();
        vm["vmm"]["socket"] = json!(socket);
        parse(&vm.to_string()).unwrap().twin_socket_in(directory).map_err(|error| error.to_string())
    };
    let inside = directory.join("vmm.sock");
    assert_eq!(socket("vmm.sock").unwrap(), inside);
    assert_eq!(socket(inside.to_str().unwrap()).unwrap(), inside);
    assert_eq!(socket("sub/vmm.sock").unwrap(), directory.join("sub/vmm.sock"));
    for bad in ["/etc/shadow", "/run/slackwater/vms/demo.other/vmm.sock", "/run/slackwater/vms/demo.counter2"]
    {
        assert_eq!(
            socket(bad).unwrap_err(),
            format!(
                "vm.json: field `vmm.socket`: `{bad}` must lie in the VM's folder, {}: a name alone is right",
                directory.display()
            )
        );
    }
}
