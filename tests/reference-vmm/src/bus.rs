//! The guest's ports: which of them is which register of which device.

use std::io;
use std::sync::Arc;

use super::guest::{PACE_PORT, PORT_BASE, PORT_STRIDE};

/// A device's registers, as a guest's port accesses reach them.
pub trait Registers: Send + Sync {
    /// How many bytes of registers there are.
    fn bytes(&self) -> u64;
    /// Reads `data.len()` bytes from register `offset` on.
    ///
    /// # Errors
    /// The kernel's error.
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;
    /// Writes `data` from register `offset` on.
    ///
    /// # Errors
    /// The kernel's error.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;
}

/// A port access that a device refused.
#[derive(Debug, thiserror::Error)]
#[error("device {device} did not {verb} {bytes} byte(s) of register {offset}")]
pub struct AccessError {
    device: usize,
    verb: &'static str,
    bytes: usize,
    offset: u64,
    source: io::Error,
}

/// The meaning of a write to a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortWrite {
    /// A write to a device's register, or to a port without a device.
    Register,
    /// The guest's round has ended.
    Pace,
}

/// All devices, each with [`PORT_STRIDE`] ports from [`PORT_BASE`] on.
pub struct PortBus {
    devices: Vec<Arc<dyn Registers>>,
}

impl PortBus {
    /// A bus with these devices, in this order.
    pub fn new(devices: Vec<Arc<dyn Registers>>) -> Self {
        Self { devices }
    }

    /// The guest's address of device number `index`, for messages.
    pub fn guest_address(index: usize) -> String {
        format!("pio {:#x}", usize::from(PORT_BASE) + index * usize::from(PORT_STRIDE))
    }

    fn find(&self, port: u16, bytes: usize) -> Option<(usize, &dyn Registers, u64)> {
        let above = port.checked_sub(PORT_BASE)?;
        let index = usize::from(above / PORT_STRIDE);
        let offset = u64::from(above % PORT_STRIDE);
        let device = self.devices.get(index)?.as_ref();
        (offset + bytes as u64 <= device.bytes()).then_some((index, device, offset))
    }

    /// The guest reads from `port`. Where there is no register it reads all ones, as on a PC.
    ///
    /// # Errors
    /// If the device refuses it.
    pub fn read(&self, port: u16, data: &mut [u8]) -> Result<(), AccessError> {
        let bytes = data.len();
        match self.find(port, bytes) {
            Some((device, registers, offset)) => registers.read(offset, data).map_err(|source| AccessError {
                device,
                verb: "read",
                bytes,
                offset,
                source,
            }),
            None => {
                data.fill(0xff);
                Ok(())
            }
        }
    }

    /// The guest writes to `port`.
    ///
    /// # Errors
    /// If the device refuses it.
    pub fn write(&self, port: u16, data: &[u8]) -> Result<PortWrite, AccessError> {
        if port == PACE_PORT {
            return Ok(PortWrite::Pace);
        }
        let bytes = data.len();
        if let Some((device, registers, offset)) = self.find(port, bytes) {
            registers.write(offset, data).map_err(|source| AccessError {
                device,
                verb: "write",
                bytes,
                offset,
                source,
            })?;
        }
        Ok(PortWrite::Register)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Eight registers that keep what is written to them, and count how often they are used.
    #[derive(Debug, Default)]
    pub(crate) struct FakeUart(pub(crate) Mutex<Registered>);

    #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Registered {
        pub(crate) registers: [u8; 8],
        pub(crate) reads: u64,
        pub(crate) writes: u64,
    }

    impl Registers for FakeUart {
        fn bytes(&self) -> u64 {
            8
        }
        fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
            let mut uart = self.0.lock().unwrap();
            uart.reads += 1;
            data.copy_from_slice(&uart.registers[offset as usize..][..data.len()]);
            Ok(())
        }
        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            let mut uart = self.0.lock().unwrap();
            uart.writes += 1;
            uart.registers[offset as usize..][..data.len()].copy_from_slice(data);
            Ok(())
        }
    }

    #[test]
    fn every_device_has_its_own_ports() {
        let devices = [Arc::new(FakeUart::default()), Arc::new(FakeUart::default())];
        let bus = PortBus::new(devices.iter().map(|device| device.clone() as Arc<dyn Registers>).collect());
        assert_eq!(bus.write(0x1007, &[1]).unwrap(), PortWrite::Register);
        assert_eq!(bus.write(0x1010, &[2, 3]).unwrap(), PortWrite::Register);
        assert_eq!(devices[0].0.lock().unwrap().registers, [0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(devices[1].0.lock().unwrap().registers, [2, 3, 0, 0, 0, 0, 0, 0]);
        let mut byte = [0];
        bus.read(0x1011, &mut byte).unwrap();
        assert_eq!(byte, [3]);
    }

    #[test]
    fn without_a_register_the_guest_reads_ones_and_a_write_has_no_effect() {
        let device = Arc::new(FakeUart::default());
        let bus = PortBus::new(vec![device.clone()]);
        for (port, bytes) in [(0x1008, 1), (0x1007, 2), (0x1017, 1), (0xfff, 1), (0xffff, 1)] {
            let mut data = vec![0; bytes];
            bus.read(port, &mut data).unwrap();
            assert_eq!(data, vec![0xff; bytes], "{port:#x}");
            bus.write(port, &data).unwrap();
        }
        assert_eq!(*device.0.lock().unwrap(), Registered::default());
    }

    #[test]
    fn the_pace_port_belongs_to_no_device() {
        assert_eq!(PortBus::new(vec![]).write(PACE_PORT, &[0]).unwrap(), PortWrite::Pace);
    }

    #[test]
    fn an_access_that_fails_names_the_device_and_the_register() {
        struct Broken;
        impl Registers for Broken {
            fn bytes(&self) -> u64 {
                8
            }
            fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
                Err(io::ErrorKind::Other.into())
            }
            fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
                Err(io::ErrorKind::Other.into())
            }
        }
        let bus = PortBus::new(vec![Arc::new(FakeUart::default()), Arc::new(Broken)]);
        let error = bus.read(0x1017, &mut [0]).unwrap_err();
        assert_eq!(error.to_string(), "device 1 did not read 1 byte(s) of register 7");
    }
}
