use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use super::judge::GRACE;
use super::*;
use crate::inventory::{Link, Node, NodeReport, Vm, VmState};

const SINCE: i64 = 1_000;
const NOW: i64 = 2_000;

fn second(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// Both clocks say the same.
fn moment(at: i64) -> Moment {
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
    let since = Duration::from_secs(u64::try_from(at).unwrap());
    Moment { time: second(at), clock: *BEGAN + since }
}

fn key() -> VmKey {
    VmKey { namespace: "demo".into(), name: "counter".into() }
}

fn known(node: &str) -> Option<Home> {
    Some(Home { node: node.into(), since: second(SINCE), missing_since: None })
}

/// What a node says of the VM.
#[derive(Clone, Copy)]
enum Says {
    Runs,
    Paused,
    /// Paused, and held by this migration.
    Held(&'static str),
    /// Running, and held by this migration.
    Moving(&'static str),
    Nothing,
    /// Its agent does not answer; before, it said that the VM ran.
    Silent,
    /// Its agent does not answer; before, it said that it held the VM paused for this migration.
    SilentHeld(&'static str),
    /// Its agent does not answer, and never did.
    Unknown,
}

fn node(says: Says) -> Node {
    let vm = |state, id: &str| Some(Vm { state, migration_id: id.into(), ..Vm::default() });
    let vm = match says {
        Says::Runs | Says::Silent => vm(VmState::Running, ""),
        Says::Paused => vm(VmState::Paused, ""),
        Says::Held(id) | Says::SilentHeld(id) => vm(VmState::Paused, id),
        Says::Moving(id) => vm(VmState::Running, id),
        Says::Nothing | Says::Unknown => None,
    };
    let link = match says {
        Says::Silent | Says::SilentHeld(_) | Says::Unknown => {
            Link::Down { reason: "AgentUnreachable", error: "x".into() }
        }
        _ => Link::Ready,
    };
    let report = NodeReport { vms: vm.into_iter().map(|vm| (key(), vm)).collect(), ..NodeReport::default() };
    Node { link, report: (!matches!(says, Says::Unknown)).then_some(Arc::new(report)), ..Node::default() }
}

fn inventory(nodes: &[(&str, Says)]) -> Inventory {
    nodes.iter().map(|(name, says)| ((*name).to_owned(), node(*says))).collect()
}

/// A migration m from a to b.
fn moving(succeeded: Option<i64>) -> Vec<Move> {
    vec![Move {
        id: "m".into(),
        vm: key(),
        source: "a".into(),
        target: "b".into(),
        succeeded: succeeded.map(second),
    }]
}

fn home(known: Option<Home>, nodes: &[(&str, Says)], moves: &[Move]) -> (Option<String>, Vec<String>) {
    let judged = judge(&key(), known.as_ref(), &inventory(nodes), moves, true, moment(NOW));
    (judged.home.map(|home| home.node), judged.set_aside)
}

/// What it shows, who was known, who says what, our migrations, who is known then, who is set aside.
type Row<'a> = (&'a str, Option<&'a str>, &'a [(&'a str, Says)], &'a [Move], Option<&'a str>, &'a [&'a str]);

#[test]
fn the_known_node_keeps_a_vm_against_a_newcomer_until_it_passes_on() {
    use Says::{Held, Moving, Nothing, Paused, Runs, Silent, SilentHeld, Unknown};
    let under_way = moving(None);
    let other_vm = vec![Move { vm: VmKey { name: "other".into(), ..key() }, ..moving(None).remove(0) }];
    let table: &[Row<'_>] = &[
        // Not known yet.
        ("nobody reports it", None, &[("a", Nothing)], &[], None, &[]),
        ("the first is known from then on", None, &[("a", Runs)], &[], Some("a"), &[]),
        ("two at once have the same right", None, &[("a", Runs), ("b", Runs)], &[], None, &[]),
        ("a copy that is kept stopped has none", None, &[("a", Held("x")), ("b", Runs)], &[], Some("b"), &[]),
        // Known.
        ("a newcomer is set aside", Some("a"), &[("a", Runs), ("b", Runs)], &[], Some("a"), &["b"]),
        ("so are two", Some("b"), &[("a", Runs), ("b", Runs), ("c", Paused)], &[], Some("b"), &["a", "c"]),
        ("and one against a paused VM", Some("a"), &[("a", Paused), ("b", Runs)], &[], Some("a"), &["b"]),
        ("a silent agent keeps its VM", Some("a"), &[("a", Silent), ("b", Runs)], &[], Some("a"), &["b"]),
        ("even before it has answered", Some("a"), &[("a", Unknown), ("b", Runs)], &[], Some("a"), &["b"]),
        (
            "one that does not report it, for a while",
            Some("a"),
            &[("a", Nothing), ("b", Runs)],
            &[],
            Some("a"),
            &["b"],
        ),
        ("a deleted node has nothing", Some("a"), &[("b", Runs)], &[], Some("b"), &[]),
        ("nor can it choose between two", Some("a"), &[("b", Runs), ("c", Runs)], &[], None, &[]),
        // Moved by us.
        (
            "the target does not have it early",
            Some("a"),
            &[("a", Runs), ("b", Runs)],
            &under_way,
            Some("a"),
            &[],
        ),
        (
            "nor while the source runs it",
            Some("a"),
            &[("a", Moving("m")), ("b", Runs)],
            &under_way,
            Some("a"),
            &[],
        ),
        ("nor for any pause", Some("a"), &[("a", Paused), ("b", Runs)], &under_way, Some("a"), &[]),
        (
            "nor for another migration",
            Some("a"),
            &[("a", Held("x")), ("b", Runs)],
            &under_way,
            Some("a"),
            &[],
        ),
        ("nor before it runs", Some("a"), &[("a", Held("m")), ("b", Paused)], &under_way, Some("a"), &[]),
        (
            "it has it when the source says so",
            Some("a"),
            &[("a", Held("m")), ("b", Runs)],
            &under_way,
            Some("b"),
            &[],
        ),
        ("or said so last", Some("a"), &[("a", SilentHeld("m")), ("b", Runs)], &under_way, Some("b"), &[]),
        ("or has it no more", Some("a"), &[("a", Nothing), ("b", Moving("m"))], &under_way, Some("b"), &[]),
        ("not because it is silent", Some("a"), &[("a", Silent), ("b", Runs)], &under_way, Some("a"), &[]),
        ("a third gains nothing", Some("a"), &[("a", Held("m")), ("c", Runs)], &under_way, Some("a"), &["c"]),
        (
            "nor by the move of another VM",
            Some("a"),
            &[("a", Held("m")), ("b", Runs)],
            &other_vm,
            Some("a"),
            &["b"],
        ),
        (
            "success moves it from a silent node",
            Some("a"),
            &[("a", Silent), ("b", Runs)],
            &moving(Some(NOW)),
            Some("b"),
            &["a"],
        ),
        (
            "in the same second, too",
            Some("a"),
            &[("a", Silent), ("b", Runs)],
            &moving(Some(SINCE)),
            Some("b"),
            &["a"],
        ),
        (
            "not where it is not",
            Some("a"),
            &[("a", Runs), ("b", Nothing)],
            &moving(Some(NOW)),
            Some("a"),
            &[],
        ),
        (
            "nor an old one again",
            Some("a"),
            &[("a", Runs), ("b", Runs)],
            &moving(Some(SINCE - 1)),
            Some("a"),
            &["b"],
        ),
        ("nor back", Some("b"), &[("a", Held("m")), ("b", Runs)], &moving(Some(NOW)), Some("b"), &[]),
        (
            "nor one that did not leave from there",
            Some("c"),
            &[("b", Runs), ("c", Runs)],
            &moving(Some(NOW)),
            Some("c"),
            &["b"],
        ),
        (
            "a source that still runs it says too much",
            Some("b"),
            &[("a", Runs), ("b", Runs)],
            &moving(Some(NOW)),
            Some("b"),
            &["a"],
        ),
    ];
    for (what, was, nodes, moves, is, aside) in table {
        let seen = home(was.and_then(known), nodes, moves);
        let aside: Vec<String> = aside.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(seen, (is.map(str::to_owned), aside), "{what}");
    }
}

#[test]
fn a_vm_passes_on_when_its_connected_agent_has_not_reported_it_for_the_whole_grace() {
    let homes = Homes::default();
    let grace = i64::try_from(GRACE.as_secs()).unwrap();
    let look = |at: i64, a: Says, b: Says| {
        let nodes = Arc::new(inventory(&[("a", a), ("b", b)]));
        let sight = homes.look(&key(), nodes, &[], true, moment(at));
        sight.home.map(|home| home.node).unwrap_or_default()
    };
    assert_eq!(look(0, Says::Runs, Says::Nothing), "a");
    assert_eq!(look(10, Says::Nothing, Says::Runs), "a");
    assert_eq!(look(10 + grace - 1, Says::Nothing, Says::Runs), "a");
    // Its agent is restarted: that is no answer, and the time begins again.
    assert_eq!(look(10 + grace, Says::Silent, Says::Runs), "a");
    assert_eq!(look(100, Says::Unknown, Says::Runs), "a");
    assert_eq!(look(101, Says::Nothing, Says::Runs), "a");
    assert_eq!(look(101 + grace, Says::Nothing, Says::Runs), "b");
    // And now the other one is the newcomer.
    assert_eq!(look(200, Says::Runs, Says::Runs), "b");
}

#[test]
fn the_grace_is_as_long_whatever_becomes_of_the_wall_clock() {
    for wall_clock in [NOW - 500, NOW, NOW + 500] {
        let homes = Homes::default();
        let nodes = |a, b| Arc::new(inventory(&[("a", a), ("b", b)]));
        let look = |at: Moment, nodes| homes.look(&key(), nodes, &[], true, at).home.unwrap().node;
        let after = |at: i64| Moment { time: second(wall_clock), ..moment(NOW + at) };
        assert_eq!(look(moment(NOW), nodes(Says::Runs, Says::Nothing)), "a");
        assert_eq!(look(moment(NOW), nodes(Says::Nothing, Says::Runs)), "a");
        assert_eq!(look(after(4), nodes(Says::Nothing, Says::Runs)), "a", "{wall_clock}");
        assert_eq!(look(after(5), nodes(Says::Nothing, Says::Runs)), "b", "{wall_clock}");
    }
}

#[test]
fn the_next_operator_knows_from_the_assignedvms_and_nothing_of_a_report_that_is_set_aside_is_seen() {
    let homes = Homes::default();
    let mut object = AssignedVM::new("counter", Default::default());
    object.metadata.namespace = Some("demo".into());
    object.status =
        Some(slackwater_api::AssignedVMStatus { node_name: Some("b".into()), ..Default::default() });
    homes.restore([&object].into_iter(), second(NOW));
    let nodes = Arc::new(inventory(&[("a", Says::Held("x")), ("b", Says::Runs), ("c", Says::Runs)]));
    let sight = homes.look(&key(), Arc::clone(&nodes), &[], true, moment(NOW));
    // What others hold is as it was.
    assert!(nodes["c"].report.as_ref().unwrap().vms.contains_key(&key()));
    let who = |node: &str| sight.inventory[node].report.as_ref().unwrap().vms.contains_key(&key());
    assert_eq!((who("a"), who("b"), who("c")), (false, true, false));
    assert_eq!(sight.set_aside, ["c"]);
    let mut seen = homes.set_aside();
    homes.publish(&key(), &sight);
    assert!(seen.has_changed().unwrap());
    assert_eq!(seen.borrow_and_update()["c"], BTreeMap::from([(key(), "b".to_owned())]));
    homes.publish(&key(), &sight);
    assert!(!seen.has_changed().unwrap());
    homes.forget(&key());
    let sight = homes.look(&key(), Arc::new(inventory(&[("c", Says::Runs)])), &[], true, moment(NOW));
    homes.publish(&key(), &sight);
    assert!(seen.borrow_and_update().is_empty());
    assert_eq!(sight.home.unwrap().node, "c");
}

#[test]
fn an_operator_that_starts_after_a_success_knows_that_the_vm_has_moved() {
    let homes = Homes::default();
    let since = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(second(SINCE));
    let mut object = AssignedVM::new("counter", Default::default());
    object.metadata.namespace = Some("demo".into());
    object.status = Some(slackwater_api::AssignedVMStatus {
        node_name: Some("a".into()),
        node_since: Some(since),
        ..Default::default()
    });
    homes.restore([&object].into_iter(), second(NOW));
    let nodes = inventory(&[("a", Says::Silent), ("b", Says::Runs)]);
    let sight = homes.look(&key(), Arc::new(nodes), &moving(Some(SINCE + 60)), true, moment(NOW));
    assert_eq!(sight.home.unwrap().node, "b");
}

#[test]
fn before_every_agent_has_reported_nobody_gets_a_new_name_and_the_known_keep_theirs() {
    let homes = Homes::default();
    let look = |nodes: &[(&str, Says)], settled: bool| {
        let sight = homes.look(&key(), Arc::new(inventory(nodes)), &[], settled, moment(NOW));
        sight.home.map(|home| home.node)
    };
    assert_eq!(look(&[("a", Says::Runs)], false), None);
    assert_eq!(look(&[("a", Says::Runs)], true).as_deref(), Some("a"));
    assert_eq!(look(&[("a", Says::Runs), ("b", Says::Runs)], false).as_deref(), Some("a"));
}

#[test]
fn an_agent_that_is_not_connected_keeps_its_vm_however_long_it_does_not_report_it() {
    for before in [Says::Runs, Says::Nothing] {
        let homes = Homes::default();
        let grace = i64::try_from(GRACE.as_secs()).unwrap();
        let look = |at: i64, a: Says, b: Says| {
            let nodes = Arc::new(inventory(&[("a", a), ("b", b)]));
            let sight = homes.look(&key(), nodes, &[], true, moment(at));
            sight.home.map(|home| home.node).unwrap_or_default()
        };
        assert_eq!(look(0, Says::Runs, Says::Nothing), "a");
        assert_eq!(look(10, before, Says::Runs), "a");
        assert_eq!(look(10 + grace, Says::Unknown, Says::Runs), "a");
        assert_eq!(look(10 + 10 * grace, Says::Unknown, Says::Runs), "a");
    }
}

#[test]
fn what_an_earlier_operator_has_known_does_not_replace_what_is_known_by_now() {
    let homes = Homes::default();
    let nodes = Arc::new(inventory(&[("a", Says::Runs), ("b", Says::Nothing)]));
    homes.look(&key(), Arc::clone(&nodes), &[], true, moment(NOW));
    let mut object = AssignedVM::new("counter", Default::default());
    object.metadata.namespace = Some("demo".into());
    object.status =
        Some(slackwater_api::AssignedVMStatus { node_name: Some("b".into()), ..Default::default() });
    homes.restore([&object].into_iter(), second(NOW));
    assert_eq!(homes.look(&key(), nodes, &[], true, moment(NOW)).home.unwrap().node, "a");
}

#[test]
fn a_migration_that_has_failed_gives_its_target_no_right_and_one_that_goes_on_or_succeeded_does() {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
    let migration = |completion_time: Option<Time>, succeeded: &str| {
        let spec = slackwater_api::VMMigrationSpec::new("counter");
        let mut object = VMMigration::new("move", spec.clone());
        object.metadata.uid = Some("m".into());
        object.metadata.namespace = Some("demo".into());
        let condition = Condition {
            type_: SUCCEEDED.into(),
            status: succeeded.into(),
            reason: "X".into(),
            message: String::new(),
            observed_generation: None,
            last_transition_time: Time(second(SINCE)),
        };
        object.status = Some(slackwater_api::VMMigrationStatus {
            observed_spec: Some(spec),
            source_node: Some("a".into()),
            target_node: Some("b".into()),
            conditions: vec![condition],
            completion_time,
            ..Default::default()
        });
        moves([&object].into_iter())
    };
    assert_eq!(migration(None, "Unknown"), moving(None));
    assert_eq!(migration(Some(Time(second(NOW))), "True"), moving(Some(NOW)));
    assert_eq!(migration(Some(Time(second(NOW))), "False"), []);
}
