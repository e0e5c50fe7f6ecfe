//! The link between the nodes: a switch in the lab's own process. Every node's second network card is
//! connected to it by a Unix socket (QEMU's `-netdev stream`), so that no frame ever reaches a network of
//! this machine, and no address or group is shared with another lab that runs at the same time.
//!
//! A frame is preceded by its length, four bytes, big endian. Where it goes is read from its destination: the
//! cards' addresses end in their node's number ([`mac_of`]), so that there is nothing to learn; a group
//! address goes to all others.

use std::{io, path::Path, sync::Arc};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader, BufWriter},
    net::{UnixListener, UnixStream},
    sync::mpsc,
};

/// Frames that wait for one node. When the queue is full the sender waits: dropped frames would slow down TCP
/// in the nodes.
const QUEUE: usize = 256;

/// What QEMU's own buffers hold (NET_BUFSIZE).
const MAX_FRAME_BYTES: usize = 4096 + 65536;

type Frame = Arc<Vec<u8>>;

/// The ports of a switch, not yet running: bound before a QEMU starts, so that it finds its own.
#[derive(Debug)]
pub(crate) struct Switch {
    listeners: Vec<UnixListener>,
}

/// The address of a node's card on the link.
pub(crate) fn mac_of(number: u8) -> String {
    format!("52:54:00:77:00:{number:02x}")
}

impl Switch {
    /// Binds a port for each path. The node at index 0 has number 1.
    pub(crate) fn bind(paths: &[impl AsRef<Path>]) -> io::Result<Self> {
        let listeners = paths.iter().map(UnixListener::bind).collect::<io::Result<_>>()?;
        Ok(Self { listeners })
    }

    /// Forwards frames while it is polled.
    pub(crate) async fn run(self) {
        let (queues, ports): (Vec<_>, Vec<_>) = self
            .listeners
            .into_iter()
            .map(|listener| (listener, mpsc::channel::<Frame>(QUEUE)))
            .map(|(l, (s, r))| (s, (l, r)))
            .unzip();
        let queues: Arc<[_]> = queues.into();
        let ports = ports.into_iter().enumerate().map(|(index, (listener, queue))| {
            let queues = Arc::clone(&queues);
            async move {
                // A port serves one QEMU; when that ends, so does the port.
                if let Ok((stream, _)) = listener.accept().await {
                    let _ended = serve(index, stream, &queues, queue).await;
                }
            }
        });
        futures::future::join_all(ports).await;
    }
}

async fn serve(
    index: usize,
    stream: UnixStream,
    queues: &[mpsc::Sender<Frame>],
    mut queue: mpsc::Receiver<Frame>,
) -> io::Result<()> {
    let (from, to) = stream.into_split();
    let mut from = BufReader::with_capacity(1 << 18, from);
    let mut to = BufWriter::with_capacity(1 << 18, to);
    let receive = async {
        loop {
            let bytes = from.read_u32().await? as usize;
            if bytes > MAX_FRAME_BYTES {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "frame too large"));
            }
            let mut frame = vec![0; bytes];
            from.read_exact(&mut frame).await?;
            let frame = Arc::new(frame);
            for (_, queue) in queues.iter().enumerate().filter(|(to, _)| reaches(&frame, index, *to)) {
                // A node that is switched off receives nothing.
                let _ = queue.send(Arc::clone(&frame)).await;
            }
        }
    };
    let send = async {
        while let Some(frame) = queue.recv().await {
            let mut next = Some(frame);
            while let Some(frame) = next {
                to.write_u32(u32::try_from(frame.len()).map_err(io::Error::other)?).await?;
                to.write_all(&frame).await?;
                next = queue.try_recv().ok();
            }
            to.flush().await?;
        }
        Ok(())
    };
    tokio::select! {
        result = receive => result,
        result = send => result,
    }
}

/// Whether a frame that came in at one port goes out at another.
fn reaches(frame: &[u8], from: usize, to: usize) -> bool {
    let [first, _, _, _, _, last, ..] = frame else { return false };
    let group = first & 1 == 1;
    from != to && (group || usize::from(*last) == to + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_goes_to_its_addressee_and_a_broadcast_to_all_others() {
        let to_second = [0x52, 0x54, 0, 0x77, 0, 2, 9, 9];
        let to_all = [0xff; 8];
        assert!(reaches(&to_second, 0, 1));
        assert!(!reaches(&to_second, 0, 2));
        assert!(reaches(&to_all, 0, 1) && reaches(&to_all, 0, 2));
        assert!(!reaches(&to_all, 1, 1), "a frame must not come back to its sender");
        assert!(!reaches(&[1, 2], 0, 1));
    }

    #[tokio::test]
    async fn frames_cross_the_switch_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let paths = [folder.path().join("1"), folder.path().join("2")];
        let switch = tokio::spawn(Switch::bind(&paths).unwrap().run());
        let mut first = UnixStream::connect(&paths[0]).await.unwrap();
        let mut second = UnixStream::connect(&paths[1]).await.unwrap();
        for byte in 0..100_u8 {
            let mut frame = vec![0x52, 0x54, 0, 0x77, 0, 2];
            frame.resize(1000, byte);
            first.write_u32(1000).await.unwrap();
            first.write_all(&frame).await.unwrap();
        }
        for byte in 0..100_u8 {
            let mut frame = vec![0; second.read_u32().await.unwrap() as usize];
            second.read_exact(&mut frame).await.unwrap();
            assert_eq!((frame.len(), frame[999]), (1000, byte));
        }
        switch.abort();
    }
}
