//! Objects that are not as the operator writes them: restored ones, and those of another version.

use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::core::{DynamicObject, GroupVersionKind};
use kube::discovery::ApiResource;
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use slackwater_api::{AssignedVM, MIGRATION_FINALIZER, MigrationNode, VMMigration, VMMigrationSpec};
use slackwater_proto::node::{Outcome, Phase};

use crate::fake_agent::{device, vm};
use crate::world::{NAMESPACE, World, condition, is};

fn with_finalizer(name: &str, change: impl FnOnce(&mut VMMigrationSpec)) -> VMMigration {
    let mut spec = VMMigrationSpec::new("counter");
    change(&mut spec);
    let mut object = VMMigration::new(name, spec);
    object.metadata.finalizers = Some(vec!["somebody.example/else".into(), MIGRATION_FINALIZER.into()]);
    object
}

#[tokio::test]
async fn a_migration_that_was_created_with_its_finalizer_can_be_deleted() {
    let world = World::start().await;
    let create =
        async |object: VMMigration| world.migrations().create(&PostParams::default(), &object).await.unwrap();
    // As a restored backup has it: created, and deleted before or after the operator has acted.
    let refused = create(with_finalizer("refused", |spec| spec.vm_ref.name = "unknown".into())).await;
    let cancelled = create(with_finalizer("cancelled", |spec| spec.cancel = true)).await;
    world.until("refused", "be refused", is("Accepted", "False/VMNotFound")).await;
    // And as a dump has it that is applied: the finalizer belongs to another field manager.
    let applied = serde_json::to_value(with_finalizer("applied", |_| {})).unwrap();
    let params = PatchParams::apply("restore").force();
    let applied = world.migrations().patch("applied", &params, &Patch::Apply(applied)).await.unwrap();
    for object in [refused, cancelled, applied] {
        let name = object.name_any();
        world.delete(&name).await;
        // The operator takes its own away, and no other.
        world
            .until(&name, "have lost the operator's finalizer", |migration| {
                Some(migration.finalizers() == ["somebody.example/else"])
            })
            .await;
        let patch = Patch::Merge(json!({"metadata": {"finalizers": null}}));
        world.migrations().patch(&name, &PatchParams::default(), &patch).await.unwrap();
        world.until_gone(&object).await;
    }
    world.assert_nothing_was_forbidden();
}

#[tokio::test]
async fn a_finalizer_that_was_removed_by_hand_leaves_the_vm_to_the_next_migration() {
    let mut world = World::start().await;
    world.migrate("first", |_| {}).await;
    world.a.until_joined(1).await;
    world.a.phase(Phase::PreCopy);
    // The target goes away for good.
    world.b.stop();
    world
        .node("node-b", "not be Ready", |node| condition(&node.status.as_ref()?.conditions, "Ready", "False"))
        .await;
    world.a.finish(Outcome::RolledBack, "PeerLost", "the link broke");
    let ended = world.until("first", "be rolled back", is("Succeeded", "False/PeerLost")).await;
    world.delete("first").await;
    let patch = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    world.migrations().patch("first", &PatchParams::default(), &patch).await.unwrap();
    world.until_gone(&ended).await;

    world.migrate("second", |spec| spec.target = None).await;
    let second = world.until("second", "be refused", is("Succeeded", "False")).await;
    assert_eq!(is("Accepted", "False/NoSuitableNode")(&second), Some(true), "{:#?}", second.status);
    world.assert_nothing_was_forbidden();
}

/// Takes the lists of known values out of a CRD, as a newer version may have longer ones.
fn forget_enums(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.get("enum").is_some_and(Value::is_array) {
                fields.remove("enum");
            }
            fields.values_mut().for_each(forget_enums);
        }
        Value::Array(items) => items.iter_mut().for_each(forget_enums),
        _ => {}
    }
}

async fn allow_any_value(world: &World, crd: &str) {
    let kind = GroupVersionKind::gvk("apiextensions.k8s.io", "v1", "CustomResourceDefinition");
    let crds: Api<DynamicObject> = Api::all_with(world.client.clone(), &ApiResource::from_gvk(&kind));
    let mut definition = crds.get(crd).await.unwrap();
    forget_enums(&mut definition.data["spec"]);
    definition.metadata.managed_fields = None;
    crds.replace(crd, &PostParams::default(), &definition).await.unwrap();
}

/// Sets a field of a status to a value that this version does not know.
async fn set_unknown<K>(world: &World, api: Api<K>, name: &str, status: Value)
where
    K: kube::Resource<DynamicType = ()> + Clone + std::fmt::Debug,
{
    let path = format!("{}/{name}/status", api.resource_url());
    let body = serde_json::to_vec(&json!({ "status": status })).unwrap();
    let patched = async || {
        let request = http::Request::patch(&path).header("content-type", "application/merge-patch+json");
        world.client.request::<Value>(request.body(body.clone()).unwrap()).await
    };
    // The API server takes a changed definition a moment later.
    let mut polls = tokio::time::interval(std::time::Duration::from_millis(200));
    let taken = async {
        while patched().await.is_err() {
            polls.tick().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), taken).await.unwrap();
}

#[tokio::test]
async fn an_object_with_a_value_of_another_version_is_reported_and_left_alone_and_all_others_go_on() {
    let mut world = World::start().await;
    world.b.describe(|node| {
        node.vms = vec![vm(NAMESPACE, "other", &["b3"])];
        node.devices = ["b1", "b2"].map(|name| device(name, "mtty-1", "")).to_vec();
        node.devices.push(device("b3", "mtty-1", "VM demo/other"));
    });
    world.vm("other", "be Ready", |vm| condition(&vm.status.as_ref()?.conditions, "Ready", "True")).await;
    world.kill_operator().await;
    for crd in ["vmmigrations", "assignedvms", "migrationnodes"] {
        allow_any_value(&world, &format!("{crd}.slackwater.dev")).await;
    }
    let strange = VMMigration::new("strange", VMMigrationSpec::new("counter"));
    world.migrations().create(&PostParams::default(), &strange).await.unwrap();
    set_unknown(&world, world.migrations(), "strange", json!({"phase": "Teleporting"})).await;
    let vms: Api<AssignedVM> = Api::namespaced(world.client.clone(), NAMESPACE);
    set_unknown(&world, vms, "other", json!({"state": "Dreaming"})).await;
    let nodes: Api<MigrationNode> = Api::all(world.client.clone());
    let devices =
        json!([{"name": "b1", "driver": "mtty", "model": "mtty-1", "free": true, "features": ["Warp"]}]);
    set_unknown(&world, nodes, "node-b", json!({"devices": devices})).await;
    world.crash_and_restart_operator().await;

    // To the node whose status it cannot read.
    world.migrate("move-counter", |_| {}).await;
    world.a.until_joined(1).await;
    world.a.finish(Outcome::Succeeded, "", "");
    world.until("move-counter", "have succeeded", is("Succeeded", "True")).await;

    let note = &world.until_events(NAMESPACE, "strange", &["UnknownContent"]).await[0];
    assert!(note.contains("status.phase: unknown variant `Teleporting`, expected one of"), "{note}");
    world.until_events(NAMESPACE, "other", &["UnknownContent"]).await;
    world.until_events("kube-system", "node-b", &["UnknownContent"]).await;
    let plane = world.lab.control_plane().unwrap();
    let shown = |kind: &'static str, name: &'static str| async move {
        let text = plane.kubectl(&["get", kind, name, "-n", NAMESPACE, "-o", "json"]).await.unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["status"].clone()
    };
    let (strange, other, node) =
        (shown("vmmig", "strange").await, shown("avm", "other").await, shown("mignode", "node-b").await);
    assert_eq!((&strange["phase"], &other["state"]), (&json!("Teleporting"), &json!("Dreaming")));
    assert_eq!(node["devices"][0]["features"], json!(["Warp"]));
    for status in [strange, other, node] {
        let conditions = status["conditions"].as_array().unwrap();
        let marks = conditions.iter().filter(|c| c["type"] == "Readable" && c["status"] == "False").count();
        assert_eq!(marks, 1, "{status:#}");
    }

    // Mended by hand, it is taken up, and is not marked any more.
    set_unknown(&world, world.migrations(), "strange", json!({"phase": null})).await;
    let taken_up = world.until("strange", "have succeeded", is("Succeeded", "True")).await;
    world
        .until("strange", "have no mark", |m| {
            Some(m.status.as_ref()?.conditions.iter().all(|condition| condition.type_ != "Readable"))
        })
        .await;
    world.migrations().delete(&taken_up.name_any(), &DeleteParams::default()).await.unwrap();
    world.until_gone(&taken_up).await;
    world.assert_nothing_was_forbidden();
}
