//! The lab's side of a node's control service.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time::timeout,
};

use super::clock::{ClockReading, monotonic_ns};
use super::protocol::{self, Request, Response};
use crate::error::LabError;

/// How long the node may take for an answer, besides what it waits for.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// How often the clock is read; the narrowest exchange counts.
const CLOCK_EXCHANGES: usize = 40;

/// A client of one node's service. Each request has a connection of its own, so that a waiting request blocks
/// no other.
#[derive(Clone, Debug)]
pub(crate) struct Control {
    pub(crate) node: String,
    pub(crate) address: SocketAddr,
}

struct Connection<'a> {
    control: &'a Control,
    stream: BufReader<TcpStream>,
}

impl Control {
    /// Sends a request that the node carries out at once.
    pub(crate) async fn ask(
        &self,
        request: &Request,
        payload: &[u8],
    ) -> Result<(Response, Vec<u8>), LabError> {
        self.ask_for(request, payload, Duration::ZERO).await
    }

    /// Sends a request that the node itself limits to `takes`.
    pub(crate) async fn ask_for(
        &self,
        request: &Request,
        payload: &[u8],
        takes: Duration,
    ) -> Result<(Response, Vec<u8>), LabError> {
        let limit = takes + ANSWER_TIMEOUT;
        let talk = async { self.connect().await?.ask(request, payload).await };
        timeout(limit, talk).await.map_err(|_| LabError::TimedOut {
            action: format!("node {}: {request:?}", self.node),
            seconds: limit.as_secs(),
        })?
    }

    /// Reads the node's clock.
    pub(crate) async fn clock(&self) -> Result<ClockReading, LabError> {
        let talk = async {
            let mut connection = self.connect().await?;
            let mut narrowest: Option<ClockReading> = None;
            for _ in 0..CLOCK_EXCHANGES {
                let sent_ns = monotonic_ns();
                let (response, _) = connection.ask(&Request::Clock, b"").await?;
                let received_ns = monotonic_ns();
                let Response::Clock { monotonic_ns: node_ns } = response else {
                    return Err(self.unexpected_answer(&response));
                };
                let node_ns = i64::try_from(node_ns).unwrap_or(i64::MAX);
                let reading = ClockReading::from_exchange(sent_ns, node_ns, received_ns);
                if narrowest.is_none_or(|narrowest| reading.error_ns < narrowest.error_ns) {
                    narrowest = Some(reading);
                }
            }
            narrowest.ok_or_else(|| self.refusal("no clock"))
        };
        timeout(ANSWER_TIMEOUT, talk).await.map_err(|_| LabError::TimedOut {
            action: format!("reading the clock of node {}", self.node),
            seconds: ANSWER_TIMEOUT.as_secs(),
        })?
    }

    async fn connect(&self) -> Result<Connection<'_>, LabError> {
        let action = || format!("connecting to the control service of node {}", self.node);
        let stream = TcpStream::connect(self.address).await.map_err(LabError::io(action()))?;
        stream.set_nodelay(true).map_err(LabError::io(action()))?;
        Ok(Connection { control: self, stream: BufReader::with_capacity(1 << 16, stream) })
    }

    pub(crate) fn refusal(&self, message: impl Into<String>) -> LabError {
        LabError::Refused { node: self.node.clone(), message: message.into() }
    }

    pub(crate) fn unexpected_answer(&self, response: &Response) -> LabError {
        self.refusal(format!("unexpected answer: {response:?}"))
    }
}

impl Connection<'_> {
    async fn ask(&mut self, request: &Request, payload: &[u8]) -> Result<(Response, Vec<u8>), LabError> {
        let action = || format!("talking to the control service of node {}", self.control.node);
        let message = protocol::encode(request, payload).map_err(LabError::io(action()))?;
        self.stream.write_all(&message).await.map_err(LabError::io(action()))?;
        let mut line = Vec::new();
        let read = self.stream.read_until(b'\n', &mut line).await.map_err(LabError::io(action()))?;
        if read == 0 {
            return Err(self.control.refusal("the control service closed the connection"));
        }
        let (response, bytes) = protocol::decode::<Response>(&line).map_err(LabError::io(action()))?;
        let mut payload = vec![0; bytes];
        self.stream.read_exact(&mut payload).await.map_err(LabError::io(action()))?;
        match response {
            Response::Failed { message } => Err(self.control.refusal(message)),
            response => Ok((response, payload)),
        }
    }
}
