//! A Kubernetes control plane: real etcd and kube-apiserver on this machine's loopback interface, with the
//! audit log on; or a cluster that is there already.
//!
//! Which one:
//! - [`CLUSTER_VARIABLE`] names a kubeconfig: that cluster is used, and neither started nor stopped. (Not the
//!   ambient `KUBECONFIG` by itself: the lab installs cluster-wide definitions, and a production cluster must
//!   not get them because a variable was set for another purpose. `SLACKWATER_LAB_KUBECONFIG=$KUBECONFIG`
//!   states the intent.)
//! - `KUBEBUILDER_ASSETS` names a folder: etcd and kube-apiserver are taken from it.
//! - Otherwise from what `tests/setup/install kubernetes` built.

mod audit;

use std::{
    fs::File,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    time::Duration,
};

use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::ServiceAccount,
};
use kube::{
    Api, Client, Config,
    api::PostParams,
    config::{KubeConfigOptions, Kubeconfig},
};
use rustix::process::Signal;
use serde_json::json;
use tokio::{
    process::Command,
    time::{MissedTickBehavior, interval, timeout},
};

pub use audit::AuditEvent;

use crate::error::{LabError, last_lines};
use crate::host::children::{self, RunningChild};
use crate::host::installed::installed;
use crate::pki::{Pki, Subject, write_secret};

/// Names the kubeconfig of a cluster to use instead of a control plane of the lab's own.
pub const CLUSTER_VARIABLE: &str = "SLACKWATER_LAB_KUBECONFIG";

const READY_TIMEOUT: Duration = Duration::from_secs(120);
const TOOL_TIMEOUT: Duration = Duration::from_secs(120);

/// How often to ask the API server whether it is ready: it sends no notice.
const READY_INTERVAL: Duration = Duration::from_millis(50);

/// A control plane.
#[derive(Debug)]
pub struct ControlPlane {
    kubeconfig: PathBuf,
    folder: PathBuf,
    audit_log: Option<PathBuf>,
    tools: PathBuf,
    // The API server goes first when this is dropped.
    running: Option<[RunningChild; 2]>,
}

impl ControlPlane {
    /// Starts it, and waits until it is ready. Its files are kept in `folder`.
    pub(crate) async fn start(folder: PathBuf) -> Result<Self, LabError> {
        std::fs::create_dir_all(&folder).map_err(LabError::io(format!("making {}", folder.display())))?;
        let tools = installed("kubectl-helm")?.join("bin");
        if let Some(kubeconfig) = std::env::var_os(CLUSTER_VARIABLE) {
            return Ok(Self { kubeconfig: kubeconfig.into(), folder, audit_log: None, tools, running: None });
        }
        let programs = match std::env::var_os("KUBEBUILDER_ASSETS") {
            Some(assets) => PathBuf::from(assets),
            None => installed("kubernetes")?.join("bin"),
        };
        let kubeconfig = folder.join("admin.kubeconfig");
        let audit_log = folder.join("audit.log");
        let [etcd_port, peer_port, port] = free_ports()?;
        write_files(&folder, &kubeconfig, port)?;
        let etcd = start_etcd(&programs, &folder, etcd_port, peer_port).await?;
        let api_server = start_api_server(&programs, &folder, etcd_port, port).await?;
        let plane =
            Self { kubeconfig, folder, audit_log: Some(audit_log), tools, running: Some([api_server, etcd]) };
        plane.ready().await?;
        Ok(plane)
    }

    async fn ready(&self) -> Result<(), LabError> {
        let Some([api_server, etcd]) = &self.running else { return Ok(()) };
        let client = self.client().await?;
        let ready = async {
            let mut ticks = interval(READY_INTERVAL);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                let request = http::Request::get("/readyz").body(Vec::new());
                if let Ok(request) = request
                    && client.request_text(request).await.is_ok()
                {
                    return;
                }
            }
        };
        let ended = |program: &str| {
            let log = last_lines(&self.folder.join(format!("{program}.log")));
            LabError::ControlPlane(format!("{program} ended; its log ends with\n{log}"))
        };
        tokio::select! {
            ready = timeout(READY_TIMEOUT, ready) => ready.map_err(|_| LabError::TimedOut {
                action: "the API server's start".into(),
                seconds: READY_TIMEOUT.as_secs(),
            }),
            _ = api_server.ended() => Err(ended("kube-apiserver")),
            _ = etcd.ended() => Err(ended("etcd")),
        }
    }

    /// From now on the API server answers no request. Its connections stay open, so that clients get no error
    /// either.
    ///
    /// # Errors
    /// When the cluster is not the lab's own.
    pub fn freeze_api_server(&self) -> Result<(), LabError> {
        self.signal_api_server(Signal::STOP)
    }

    /// The API server continues.
    ///
    /// # Errors
    /// When the cluster is not the lab's own.
    pub fn thaw_api_server(&self) -> Result<(), LabError> {
        self.signal_api_server(Signal::CONT)
    }

    fn signal_api_server(&self, signal: Signal) -> Result<(), LabError> {
        let foreign = || {
            LabError::ControlPlane(format!(
                "the API server of the cluster of {CLUSTER_VARIABLE} is not the lab's to stop"
            ))
        };
        let [api_server, _] = self.running.as_ref().ok_or_else(foreign)?;
        api_server.signal(signal);
        Ok(())
    }

    /// The administrator's kubeconfig.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A client with the administrator's rights.
    ///
    /// # Errors
    /// When the kubeconfig cannot be read.
    pub async fn client(&self) -> Result<Client, LabError> {
        let failed =
            |error: String| LabError::ControlPlane(format!("{}: {error}", self.kubeconfig.display()));
        let kubeconfig =
            Kubeconfig::read_from(&self.kubeconfig).map_err(|error| failed(error.to_string()))?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
            .await
            .map_err(|error| failed(error.to_string()))?;
        Client::try_from(config).map_err(|error| failed(error.to_string()))
    }

    /// Writes a kubeconfig with the rights of a service account only. Its token is valid for an hour.
    ///
    /// # Errors
    /// When there is no such account.
    pub async fn service_account_kubeconfig(
        &self,
        namespace: &str,
        account: &str,
    ) -> Result<PathBuf, LabError> {
        let failed =
            |error: String| LabError::ControlPlane(format!("a token for {namespace}/{account}: {error}"));
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client().await?, namespace);
        let request = TokenRequest {
            spec: TokenRequestSpec { expiration_seconds: Some(3600), ..TokenRequestSpec::default() },
            ..TokenRequest::default()
        };
        let answer = accounts
            .create_token_request(account, &PostParams::default(), &request)
            .await
            .map_err(|error| failed(error.to_string()))?;
        let token = answer.status.ok_or_else(|| failed("the answer has none".into()))?.token;
        let mut kubeconfig =
            Kubeconfig::read_from(&self.kubeconfig).map_err(|error| failed(error.to_string()))?;
        kubeconfig.auth_infos = serde_json::from_value(json!([{"name": account, "user": {"token": token}}]))
            .map_err(|error| failed(error.to_string()))?;
        for context in &mut kubeconfig.contexts {
            if let Some(context) = &mut context.context {
                context.user = Some(account.to_owned());
                context.namespace = Some(namespace.to_owned());
            }
        }
        // JSON is YAML, too.
        let text = serde_json::to_string_pretty(&kubeconfig).map_err(|error| failed(error.to_string()))?;
        let path = self.folder.join(format!("{namespace}-{account}.kubeconfig"));
        write_secret(&path, &text)?;
        Ok(path)
    }

    /// Runs kubectl as the administrator, and returns its standard output.
    ///
    /// # Errors
    /// When it fails, with its standard error.
    pub async fn kubectl(&self, arguments: &[&str]) -> Result<String, LabError> {
        self.tool("kubectl", arguments).await
    }

    /// Installs a chart, and returns what helm printed. `values` are set as `--set KEY=VALUE`.
    ///
    /// # Errors
    /// When helm fails, with its standard error.
    pub async fn helm_install(
        &self,
        release: &str,
        chart: &Path,
        namespace: &str,
        values: &[(&str, &str)],
    ) -> Result<String, LabError> {
        let chart = chart.to_string_lossy();
        let settings: Vec<String> = values.iter().map(|(key, value)| format!("{key}={value}")).collect();
        // Server-side apply, helm's default, is refused by a 1.20 API server where a definition carries CEL
        // rules.
        let mut arguments = vec!["install", release, &*chart, "--namespace", namespace, "--create-namespace"];
        arguments.push("--server-side=false");
        for setting in &settings {
            arguments.extend(["--set", setting]);
        }
        self.helm(&arguments).await
    }

    /// Runs helm as the administrator, and returns its standard output.
    ///
    /// # Errors
    /// When it fails, with its standard error.
    pub async fn helm(&self, arguments: &[&str]) -> Result<String, LabError> {
        self.tool("helm", arguments).await
    }

    async fn tool(&self, name: &str, arguments: &[&str]) -> Result<String, LabError> {
        let output = Command::new(self.tools.join(name))
            .args(arguments)
            .env("KUBECONFIG", &self.kubeconfig)
            // Caches and settings of its own, so that the user's do not matter.
            .env("HOME", &self.folder)
            .env("XDG_CACHE_HOME", self.folder.join("cache"))
            .env("XDG_CONFIG_HOME", self.folder.join("config"))
            .env("XDG_DATA_HOME", self.folder.join("data"))
            .kill_on_drop(true)
            .output();
        let output = timeout(TOOL_TIMEOUT, output)
            .await
            .map_err(|_| LabError::TimedOut {
                action: format!("{name} {}", arguments.join(" ")),
                seconds: TOOL_TIMEOUT.as_secs(),
            })?
            .map_err(LabError::io(format!("running {name}")))?;
        if !output.status.success() {
            return Err(LabError::ProgramFailed {
                program: format!("{name} {}", arguments.join(" ")),
                ending: output.status.to_string(),
                stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Every request that the API server has answered so far.
    ///
    /// # Errors
    /// When the log cannot be read, or the cluster is not the lab's own, whose log is not available.
    pub fn audit(&self) -> Result<Vec<AuditEvent>, LabError> {
        let log = self.audit_log.as_ref().ok_or_else(|| {
            LabError::ControlPlane(format!("the audit log of the cluster of {CLUSTER_VARIABLE} is not known"))
        })?;
        let text =
            std::fs::read_to_string(log).map_err(LabError::io(format!("reading {}", log.display())))?;
        audit::parse(&text).map_err(|error| LabError::ControlPlane(format!("{}: {error}", log.display())))
    }
}

/// Free ports. Another program may take one before its user does. All are held until all are found, so that
/// they differ.
fn free_ports<const N: usize>() -> Result<[u16; N], LabError> {
    let mut ports = [0; N];
    let mut held = Vec::new();
    for port in &mut ports {
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(LabError::io("finding a free port"))?;
        *port = listener.local_addr().map_err(LabError::io("finding a free port"))?.port();
        held.push(listener);
    }
    Ok(ports)
}

fn write_files(folder: &Path, kubeconfig: &Path, port: u16) -> Result<(), LabError> {
    let pki = Pki::new("slackwater-lab-cluster")?;
    pki.write_ca(folder)?;
    let server = Subject {
        common_name: "kube-apiserver".into(),
        names: [
            "127.0.0.1",
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "10.0.0.1",
        ]
        .map(String::from)
        .to_vec(),
        server: true,
        ..Subject::default()
    };
    pki.issue(&server)?.write(folder, "server")?;
    let admin = Subject {
        common_name: "admin".into(),
        organisation: Some("system:masters".into()),
        client: true,
        ..Subject::default()
    };
    let (certificate, key) = pki.issue(&admin)?.write(folder, "admin")?;
    // Signs the service accounts' tokens; of its certificate, only the public key is used.
    pki.issue(&Subject { common_name: "service-accounts".into(), ..Subject::default() })?
        .write(folder, "service-accounts")?;
    let policy = json!({
        "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
        "rules": [{"level": "Metadata"}],
    });
    let audit = folder.join("audit-policy.yaml");
    std::fs::write(&audit, policy.to_string())
        .map_err(LabError::io(format!("writing {}", audit.display())))?;
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "lab",
        "clusters": [{"name": "lab", "cluster": {
            "server": format!("https://127.0.0.1:{port}"), "certificate-authority": folder.join("ca.crt"),
        }}],
        "users": [{"name": "admin", "user": {"client-certificate": certificate, "client-key": key}}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "admin"}}],
    });
    write_secret(kubeconfig, &config.to_string())
}

async fn start_etcd(
    programs: &Path,
    folder: &Path,
    port: u16,
    peer_port: u16,
) -> Result<RunningChild, LabError> {
    let (client, peer) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer_port}"));
    start_logged(programs, folder, "etcd", |command| {
        command
            .args(["--name", "lab"])
            .arg("--data-dir")
            .arg(folder.join("etcd"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .arg(format!("--initial-cluster=lab={peer}"))
            // Its data goes with the lab.
            .arg("--unsafe-no-fsync");
    })
    .await
}

async fn start_api_server(
    programs: &Path,
    folder: &Path,
    etcd_port: u16,
    port: u16,
) -> Result<RunningChild, LabError> {
    let file = |flag: &str, name: &str| format!("--{flag}={}", folder.join(name).display());
    start_logged(programs, folder, "kube-apiserver", |command| {
        command
            .arg(format!("--etcd-servers=http://127.0.0.1:{etcd_port}"))
            .args(["--bind-address=127.0.0.1", "--advertise-address=127.0.0.1"])
            .arg(format!("--secure-port={port}"))
            .arg(file("tls-cert-file", "server.crt"))
            .arg(file("tls-private-key-file", "server.key"))
            .arg(file("client-ca-file", "ca.crt"))
            .arg("--authorization-mode=RBAC")
            .arg(format!("--service-account-issuer=https://127.0.0.1:{port}"))
            .arg(file("service-account-key-file", "service-accounts.crt"))
            .arg(file("service-account-signing-key-file", "service-accounts.key"))
            .args(["--service-cluster-ip-range=10.0.0.0/24", "--endpoint-reconciler-type=none"])
            .args(["--allow-privileged=true", "--disable-admission-plugins=ServiceAccount"])
            .arg(file("audit-policy-file", "audit-policy.yaml"))
            .arg(file("audit-log-path", "audit.log"))
            .arg(file("cert-dir", "certificates"));
    })
    .await
}

async fn start_logged(
    programs: &Path,
    folder: &Path,
    name: &str,
    configure: impl FnOnce(&mut std::process::Command),
) -> Result<RunningChild, LabError> {
    let path = folder.join(format!("{name}.log"));
    let failed = || LabError::io(format!("creating {}", path.display()));
    let log = File::create(&path).map_err(failed())?;
    let errors = log.try_clone().map_err(failed())?;
    let program = programs.join(name);
    children::start(&program.to_string_lossy(), |command| {
        command.stdout(log).stderr(errors);
        configure(command);
    })
    .await
}
