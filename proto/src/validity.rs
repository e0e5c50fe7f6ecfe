//! How long a certificate is valid, and when that ends.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::sleep;
use tokio_rustls::rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

/// A wait for a moment of the wall clock looks at it again after this time: it may be set, and a node may
/// have slept.
const LOOK_AT_THE_CLOCK: Duration = Duration::from_secs(30);

/// Less than this fraction of a certificate's life is left: it ends soon. cert-manager renews when a third
/// is left.
const SOON_FRACTION: i64 = 4;

/// A long-lived certificate ends soon when this many seconds are left: 30 days.
const SOON_SECONDS: i64 = 30 * 24 * 3600;

/// The time in which a certificate, or every one of a chain, is valid. Seconds since 1970, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first second.
    pub not_before: i64,
    /// The last second.
    pub not_after: i64,
}

impl Validity {
    /// That of a whole chain. `None` if a certificate cannot be read, or there is none.
    pub(crate) fn of_chain(chain: &[CertificateDer<'_>]) -> Option<Self> {
        let each = chain.iter().map(|der| {
            let (_, certificate) = X509Certificate::from_der(der).ok()?;
            let validity = certificate.validity();
            let (not_before, not_after) = (validity.not_before.timestamp(), validity.not_after.timestamp());
            Some(Self { not_before, not_after })
        });
        let each = each.collect::<Option<Vec<_>>>()?;
        each.into_iter().reduce(|one, other| Self {
            not_before: one.not_before.max(other.not_before),
            not_after: one.not_after.min(other.not_after),
        })
    }

    /// Whether it should have been renewed by now: less than a quarter of its life is left, and less than 30
    /// days.
    pub fn ends_soon(self, now: i64) -> bool {
        let life = self.not_after.saturating_sub(self.not_before);
        self.not_after.saturating_sub(now) < (life / SOON_FRACTION).min(SOON_SECONDS)
    }
}

/// The wall clock, in seconds since 1970.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Returns when `not_after` has passed, by the wall clock.
pub(crate) async fn passed(not_after: i64) {
    loop {
        let left = not_after.saturating_sub(now());
        let Ok(left) = u64::try_from(left) else { return };
        sleep(Duration::from_secs(left.saturating_add(1)).min(LOOK_AT_THE_CLOCK)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 24 * 3600;

    #[test]
    fn a_certificate_ends_soon_in_its_last_quarter_but_not_years_before() {
        let of_days = |days: i64| Validity { not_before: 0, not_after: days * DAY };
        for (days, last_good_day, first_soon_day) in [(8, 6, 7), (90, 67, 68), (3650, 3619, 3621)] {
            assert!(!of_days(days).ends_soon(last_good_day * DAY), "{days}");
            assert!(of_days(days).ends_soon(first_soon_day * DAY), "{days}");
        }
        assert!(of_days(8).ends_soon(9 * DAY), "it has ended");
        let odd = Validity { not_before: i64::MIN, not_after: i64::MAX };
        assert!(!odd.ends_soon(0));
    }

    #[test]
    fn a_chain_is_valid_as_long_as_each_of_it() {
        let issue = |from, to| {
            let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
            params.not_before = rcgen::date_time_ymd(from, 1, 1);
            params.not_after = rcgen::date_time_ymd(to, 1, 1);
            params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().der().clone()
        };
        let chain = Validity::of_chain(&[issue(2020, 2030), issue(2021, 2025)]).unwrap();
        let one = Validity::of_chain(&[issue(2021, 2025)]).unwrap();
        assert_eq!(chain, one);
        assert_eq!(Validity::of_chain(&[]), None);
        assert_eq!(Validity::of_chain(&[issue(2020, 2030), CertificateDer::from(vec![1])]), None);
    }
}
