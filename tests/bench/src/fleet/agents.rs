//! Agents that behave well and have nothing behind them: gRPC with mutual TLS, as real ones serve it, all in
//! one process.

use std::collections::BTreeMap;
use std::future::pending;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use futures::StreamExt;
use futures::stream::BoxStream;
use slackwater_lab::Pki;
use slackwater_proto::limits::node_server;
use slackwater_proto::node::migration_event::What;
use slackwater_proto::node::node_agent_server::NodeAgent;
use slackwater_proto::node::{
    AbortRequest, AbortResponse, AcknowledgeEndRequest, AcknowledgeEndResponse, DescribeRequest,
    DescribeResponse, DeviceDescription, Finished, MigrateRequest, MigrateResponse, MigrationEvent,
    MigrationFeatures, NodeDescription, Outcome, Phase, QemuDescription, ReleaseRequest, ReleaseResponse,
    ReserveRequest, ReserveResponse, ResolveRequest, ResolveResponse, Timings, VmDescription, VmRef, VmState,
    WatchRequest, WatchResponse,
};
use slackwater_proto::server::serve;
use slackwater_proto::tls::Credentials;
use slackwater_proto::tonic::service::Routes;
use slackwater_proto::tonic::{Request, Response, Status};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, WatchStream};

/// As many features as the guest of a recent server's CPU has, with names as long.
const CPU_FEATURES: usize = 280;

/// All agents. They end with the process.
#[derive(Debug)]
pub struct Agents {
    /// host:port, by the node's name.
    pub addresses: BTreeMap<String, String>,
}

/// What each node says of itself, by its name.
type Nodes = BTreeMap<String, watch::Sender<NodeDescription>>;

/// The name of a node.
#[must_use]
pub fn node_name(number: usize) -> String {
    format!("node-{number:04}")
}

/// The name of a VM.
#[must_use]
pub fn vm_name(number: usize) -> String {
    format!("vm-{number:05}")
}

impl Agents {
    /// Starts the agents of `nodes` nodes that have `vms` VMs between them, each with one device, and as many
    /// free devices.
    ///
    /// # Errors
    /// When one cannot listen.
    pub async fn start(
        pki: &Pki,
        folder: &Path,
        namespace: &str,
        nodes: usize,
        vms: usize,
        pre_copy: Duration,
    ) -> anyhow::Result<Self> {
        let described: Nodes = (0..nodes)
            .map(|node| {
                let own = (node..vms).step_by(nodes).map(vm_name).collect::<Vec<_>>();
                (node_name(node), watch::Sender::new(describe(&node_name(node), namespace, &own)))
            })
            .collect();
        let described = Arc::new(described);
        let ca = pki.write_ca(folder)?;
        let mut addresses = BTreeMap::new();
        for name in described.keys() {
            let (certificate, key) = pki.agent(name)?.write(folder, name)?;
            let credentials = Credentials::read(&certificate, &key, &ca).context("reading a certificate")?;
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            addresses.insert(name.clone(), listener.local_addr()?.to_string());
            let agent = Agent { node: name.clone(), nodes: Arc::clone(&described), pre_copy };
            tokio::spawn(async move {
                let routes = Routes::new(node_server(agent));
                serve(listener, &credentials, routes, pending(), Duration::ZERO).await;
            });
        }
        Ok(Self { addresses })
    }
}

fn describe(node: &str, namespace: &str, vms: &[String]) -> NodeDescription {
    let device = |name: String, holder: String| DeviceDescription {
        cdev: format!("/dev/vfio/devices/{name}"),
        name,
        driver: "mlx5_vfio_pci".into(),
        model: "15b3:101e".into(),
        features: Some(MigrationFeatures { stop_copy: true, p2p: true, pre_copy: true }),
        free: holder.is_empty(),
        holder,
        ..Default::default()
    };
    let own = vms.iter().map(|vm| device(format!("{node}-{vm}"), format!("VM {namespace}/{vm}")));
    let free = (0..vms.len() + 1).map(|number| device(format!("{node}-free-{number}"), String::new()));
    NodeDescription {
        node: node.into(),
        agent_version: "0.1.0-simulated".into(),
        kernel_release: "6.12.0".into(),
        boot_id: "b00t".into(),
        devices: own.chain(free).collect(),
        vms: vms.iter().map(|vm| vm_of(node, namespace, vm)).collect(),
        ..Default::default()
    }
}

fn vm_of(node: &str, namespace: &str, name: &str) -> VmDescription {
    VmDescription {
        vm: Some(VmRef { namespace: namespace.into(), name: name.into() }),
        state: VmState::Running.into(),
        vmm_kind: "qemu".into(),
        devices: vec![format!("{node}-{name}")],
        vm_json: format!("{{\"name\": \"{name}\"}}"),
        ram_bytes: 8 << 30,
        qemu: Some(QemuDescription {
            version: "10.0.2".into(),
            package: "Debian 1:10.0.2+ds-2".into(),
            machine_type: "pc-q35-10.0".into(),
            accelerator: "kvm".into(),
            cpu_features: (0..CPU_FEATURES).map(|number| format!("feature-bit-{number:03}")).collect(),
        }),
        ..Default::default()
    }
}

struct Agent {
    node: String,
    nodes: Arc<Nodes>,
    pre_copy: Duration,
}

impl Agent {
    /// Goes through a migration as its source, and reports it.
    async fn run(
        node: String,
        nodes: Arc<Nodes>,
        pre_copy: Duration,
        request: MigrateRequest,
        events: mpsc::Sender<Result<MigrateResponse, Status>>,
    ) {
        let mut sequence = 0;
        let mut send = async |what: What| {
            sequence += 1;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let event = MigrationEvent {
                sequence,
                node: node.clone(),
                monotonic_ns: u64::try_from(now.as_nanos()).unwrap_or_default(),
                unix_ns: i64::try_from(now.as_nanos()).unwrap_or_default(),
                what: Some(what),
            };
            events.send(Ok(MigrateResponse { event: Some(event) })).await.ok();
        };
        let vm = request.vm.clone().unwrap_or_default();
        let id = request.migration.clone().unwrap_or_default().id;
        let own = |change: &mut dyn FnMut(&mut NodeDescription)| change_node(&nodes, &node, change);
        send(What::Phase(Phase::Connected.into())).await;
        own(&mut |node| of_vm(node, &vm, |vm| vm.migration_id.clone_from(&id)));
        send(What::Phase(Phase::PreCopy.into())).await;
        tokio::time::sleep(pre_copy).await;
        for phase in [Phase::Pausing, Phase::Quiescing, Phase::Stopping, Phase::Capturing] {
            send(What::Phase(phase.into())).await;
        }
        own(&mut |node| of_vm(node, &vm, |vm| vm.state = VmState::Paused.into()));
        tokio::time::sleep(Duration::from_millis(50)).await;
        for phase in [Phase::Loaded, Phase::Committed, Phase::Starting] {
            send(What::Phase(phase.into())).await;
        }
        let devices: Vec<&str> = request.devices.iter().map(|pair| pair.target.as_str()).collect();
        change_node(&nodes, &request.target_node, &mut |target: &mut NodeDescription| {
            let mut arrived = vm_of(&target.node, &vm.namespace, &vm.name);
            arrived.devices = devices.iter().map(|device| (*device).to_owned()).collect();
            target.vms.push(arrived);
            for device in target.devices.iter_mut().filter(|device| devices.contains(&device.name.as_str())) {
                (device.free, device.holder) = (false, format!("VM {}/{}", vm.namespace, vm.name));
            }
        });
        send(What::Phase(Phase::Started.into())).await;
        own(&mut |node| {
            node.vms.retain(|other| other.vm.as_ref() != Some(&vm));
            for pair in &request.devices {
                for device in node.devices.iter_mut().filter(|device| device.name == pair.source) {
                    (device.free, device.holder) = (true, String::new());
                }
            }
        });
        send(What::Phase(Phase::Released.into())).await;
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or_default();
        send(What::Finished(Finished {
            outcome: Outcome::Succeeded.into(),
            timings: Some(Timings {
                pre_copy_ns: nanoseconds(pre_copy),
                blackout_ns: 50_000_000,
                total_ns: nanoseconds(pre_copy) + 60_000_000,
            }),
            device_bytes: vec![4 << 20],
            vmm_bytes: 8 << 30,
            ..Default::default()
        }))
        .await;
    }
}

fn change_node(nodes: &Nodes, name: &str, change: &mut dyn FnMut(&mut NodeDescription)) {
    if let Some(node) = nodes.get(name) {
        node.send_modify(change);
    }
}

fn of_vm(node: &mut NodeDescription, vm: &VmRef, change: impl FnOnce(&mut VmDescription)) {
    if let Some(vm) = node.vms.iter_mut().find(|other| other.vm.as_ref() == Some(vm)) {
        change(vm);
    }
}

#[slackwater_proto::tonic::async_trait]
impl NodeAgent for Agent {
    type WatchStream = BoxStream<'static, Result<WatchResponse, Status>>;
    type MigrateStream = BoxStream<'static, Result<MigrateResponse, Status>>;

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        let node = self.nodes.get(&self.node).map(|node| node.borrow().clone());
        Ok(Response::new(DescribeResponse { node }))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let node = self.nodes.get(&self.node).ok_or_else(|| Status::internal("no such node"))?;
        let descriptions = WatchStream::new(node.subscribe());
        Ok(Response::new(descriptions.map(|node| Ok(WatchResponse { node: Some(node) })).boxed()))
    }

    async fn reserve(&self, _: Request<ReserveRequest>) -> Result<Response<ReserveResponse>, Status> {
        Ok(Response::new(ReserveResponse::default()))
    }

    async fn migrate(
        &self,
        request: Request<MigrateRequest>,
    ) -> Result<Response<Self::MigrateStream>, Status> {
        let (sender, events) = mpsc::channel(64);
        let (node, nodes) = (self.node.clone(), Arc::clone(&self.nodes));
        tokio::spawn(Self::run(node, nodes, self.pre_copy, request.into_inner(), sender));
        Ok(Response::new(ReceiverStream::new(events).boxed()))
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        Ok(Response::new(AbortResponse {}))
    }

    async fn release(&self, _: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        Ok(Response::new(ReleaseResponse {}))
    }

    async fn acknowledge_end(
        &self,
        _: Request<AcknowledgeEndRequest>,
    ) -> Result<Response<AcknowledgeEndResponse>, Status> {
        Ok(Response::new(AcknowledgeEndResponse {}))
    }

    async fn resolve(&self, _: Request<ResolveRequest>) -> Result<Response<ResolveResponse>, Status> {
        Ok(Response::new(ResolveResponse::default()))
    }
}
