//! Who may hold how much of a server: callers that have not shown a certificate yet, by address, and those
//! that have, by role.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::identity::Role;

/// Connections whose handshake is under way, in the order of their arrival. Pure.
///
/// A newcomer is always admitted. When there are too many, the oldest of the address that has the most goes:
/// one address can only push out its own, and a handshake that goes on takes milliseconds.
#[derive(Debug)]
pub(crate) struct Handshakes<T> {
    limit: usize,
    next: u64,
    waiting: BTreeMap<u64, (IpAddr, T)>,
}

impl<T> Handshakes<T> {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, next: 0, waiting: BTreeMap::new() }
    }

    /// The number of the next one.
    pub(crate) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Admits a newcomer. Returns the one that has to go for it.
    pub(crate) fn admit(&mut self, number: u64, from: IpAddr, handshake: T) -> Option<T> {
        let goes = if self.waiting.len() < self.limit { None } else { self.oldest_of_the_most() };
        let gone = goes.and_then(|number| self.waiting.remove(&number));
        self.waiting.insert(number, (source(from), handshake));
        gone.map(|(_, handshake)| handshake)
    }

    /// This one has ended, well or not.
    pub(crate) fn ended(&mut self, number: u64) {
        self.waiting.remove(&number);
    }

    fn oldest_of_the_most(&self) -> Option<u64> {
        let mut by_source = HashMap::<IpAddr, (usize, u64)>::new();
        for (number, (source, _)) in &self.waiting {
            // The first is the oldest.
            by_source.entry(*source).or_insert((0, *number)).0 += 1;
        }
        let most = by_source.into_values().max_by_key(|(count, oldest)| (*count, u64::MAX - oldest));
        most.map(|(_, oldest)| oldest)
    }
}

/// An IPv6 host owns a whole /64.
fn source(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        v4 => v4,
    }
}

/// How much callers of one kind may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Allowance {
    /// Connections of one caller.
    pub(crate) connections: usize,
    /// Calls of one caller, over all its connections.
    pub(crate) calls: usize,
    /// Calls of one connection.
    pub(crate) calls_of_a_connection: u32,
    /// What may wait unread on one connection.
    pub(crate) window_bytes: u32,
}

/// What each authenticated caller holds. A caller is a role; all without a role are one.
#[derive(Debug, Default)]
pub(crate) struct Callers(Mutex<HashMap<Option<Role>, Held>>);

#[derive(Debug, Clone)]
struct Held {
    connections: Arc<Semaphore>,
    calls: Arc<Semaphore>,
}

/// One connection of a caller, as long as it lives.
#[derive(Debug)]
pub(crate) struct Admitted {
    /// The calls of all connections of the caller.
    pub(crate) calls: Arc<Semaphore>,
    _connection: OwnedSemaphorePermit,
}

impl Callers {
    /// Admits a connection. `None`: the caller has all that it may have.
    pub(crate) fn admit(&self, caller: Option<&Role>, allowance: Allowance) -> Option<Admitted> {
        let mut callers = self.0.lock();
        let held = callers.entry(caller.cloned()).or_insert_with(|| Held {
            connections: Arc::new(Semaphore::new(allowance.connections)),
            calls: Arc::new(Semaphore::new(allowance.calls)),
        });
        let connection = Arc::clone(&held.connections).try_acquire_owned().ok()?;
        Some(Admitted { calls: Arc::clone(&held.calls), _connection: connection })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_that_floods_pushes_out_only_its_own_handshakes() {
        let mut handshakes = Handshakes::new(4);
        let mut admit = |from: &str| {
            let number = handshakes.number();
            handshakes.admit(number, ip(from), number)
        };
        assert_eq!((admit("10.0.0.1"), admit("10.0.0.2")), (None, None));
        assert_eq!((admit("::ffff:10.0.0.2"), admit("10.0.0.2")), (None, None));
        assert_eq!(admit("10.0.0.2"), Some(2), "the same address, however it is written");
        assert_eq!(admit("10.0.0.3"), Some(3));
        assert_eq!(admit("10.0.0.4"), Some(4));
        assert_eq!(admit("10.0.0.5"), Some(1), "all have one: the oldest goes");
        handshakes.ended(5);
        assert_eq!(handshakes.admit(100, ip("10.0.0.6"), 100), None);
    }

    #[test]
    fn an_ipv6_host_counts_as_one_with_all_its_addresses() {
        let mut handshakes = Handshakes::new(2);
        handshakes.admit(1, ip("fd00::1"), 1);
        handshakes.admit(2, ip("fd00:0:0:1::1"), 2);
        assert_eq!(handshakes.admit(3, ip("fd00::2"), 3), Some(1));
        assert_eq!(handshakes.admit(4, ip("fd00:0:0:1::2"), 4), Some(2), "both have one");
        assert_eq!(handshakes.admit(5, ip("fd00:0:0:1::3"), 5), Some(3));
        assert_eq!(handshakes.admit(6, ip("fd00::7"), 6), Some(4), "that /64 has two");
    }

    #[test]
    fn an_ipv6_host_with_two_addresses_goes_before_an_older_one_with_one() {
        let mut handshakes = Handshakes::new(3);
        for (number, from) in [(1, "fd00:0:0:1::1"), (2, "fd00::1"), (3, "fd00::2")] {
            assert_eq!(handshakes.admit(number, ip(from), number), None);
        }
        assert_eq!(handshakes.admit(4, ip("fd00:0:0:2::1"), 4), Some(2));
    }

    #[test]
    fn one_caller_takes_nothing_from_another() {
        let allowance = Allowance { connections: 2, calls: 1, calls_of_a_connection: 1, window_bytes: 1 };
        let callers = Callers::default();
        let agent = |node: &str| Role::Agent { node: node.to_owned() };
        let one = callers.admit(Some(&agent("a")), allowance).unwrap();
        let two = callers.admit(Some(&agent("a")), allowance).unwrap();
        assert!(callers.admit(Some(&agent("a")), allowance).is_none());
        assert!(callers.admit(Some(&agent("b")), allowance).is_some());
        assert!(callers.admit(None, allowance).is_some());
        let call = Arc::clone(&one.calls).try_acquire_owned().unwrap();
        assert!(Arc::clone(&two.calls).try_acquire_owned().is_err(), "calls count over all connections");
        drop((one, call));
        assert!(callers.admit(Some(&agent("a")), allowance).is_some());
    }
}
