//! Both ends of an attempt with fake devices and fake VMMs, over the real transport with mutual TLS.

mod devices;
mod driven;
mod giving_up;
mod hangs;
mod monitor;
pub(crate) mod rig;
mod unheard;
mod vmm;
mod whole;
