//! The operator's program, with the rights of the account from the chart. Like its Deployment, the lab
//! restarts it when it ends.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::Cluster;
use crate::host::HostProgram;

const LOG: &str = "operator.log";
/// How long to wait before it is started again.
const BACK_OFF: Duration = Duration::from_secs(1);

/// An operator that is restarted whenever it ends.
#[derive(Debug)]
pub(super) struct Supervised {
    stop: oneshot::Sender<()>,
    supervisor: JoinHandle<()>,
}

impl Cluster {
    /// Starts the operator. If one runs already, it is killed first.
    ///
    /// # Errors
    /// When it is not built.
    pub async fn start_operator(&mut self) -> anyhow::Result<()> {
        self.kill_operator().await;
        let file = |name: &str| self.lab.folder().join(name).to_string_lossy().into_owned();
        let (certificate, key, ca) = (file("operator.crt"), file("operator.key"), file("ca.crt"));
        let arguments = ["run", "--tls-cert", &certificate, "--tls-key", &key, "--tls-ca", &ca];
        let command = Command {
            arguments: arguments.map(str::to_owned).to_vec(),
            env: [
                ("KUBECONFIG", self.kubeconfig.to_string_lossy().into_owned()),
                ("NO_COLOR", "1".to_owned()),
                ("SLACKWATER_FAULTS", self.operator_faults.clone()),
            ],
            log: self.lab.folder().join(LOG),
        };
        let (stop, stopped) = oneshot::channel();
        let program = command.start().await?;
        let supervisor = tokio::spawn(supervise(command, program, stopped));
        self.operator = Some(Supervised { stop, supervisor });
        Ok(())
    }

    /// Kills the operator, if it runs, and does not start it again.
    pub async fn kill_operator(&mut self) {
        if let Some(operator) = self.operator.take() {
            let _ = operator.stop.send(());
            // The task ends only after this message.
            let _ = operator.supervisor.await;
        }
    }

    /// Whether the operator runs, or is about to be restarted.
    #[must_use]
    pub fn has_operator(&self) -> bool {
        self.operator.is_some()
    }

    /// The operator's log.
    #[must_use]
    pub fn operator_log(&self) -> String {
        std::fs::read_to_string(self.lab.folder().join(LOG)).unwrap_or_default()
    }
}

struct Command {
    arguments: Vec<String>,
    env: [(&'static str, String); 3],
    log: PathBuf,
}

impl Command {
    async fn start(&self) -> anyhow::Result<HostProgram> {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let env: Vec<(&str, &str)> = self.env.iter().map(|(name, value)| (*name, value.as_str())).collect();
        Ok(HostProgram::start("slackwater-operator", &arguments, &env, &self.log).await?)
    }
}

/// Restarts the program until `stopped` resolves.
async fn supervise(command: Command, mut program: HostProgram, mut stopped: oneshot::Receiver<()>) {
    loop {
        tokio::select! {
            _ = &mut stopped => return program.kill().await,
            () = program.ended() => {}
        }
        tokio::select! {
            _ = &mut stopped => return,
            () = tokio::time::sleep(BACK_OFF) => {}
        }
        match command.start().await {
            Ok(again) => program = again,
            Err(error) => return eprintln!("the operator could not be started again: {error:#}"),
        }
    }
}
