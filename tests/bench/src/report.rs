//! What was measured, as tables for people.

use std::fmt::Write as _;

use serde::Serialize;
use strum::VariantArray;

use super::figures::Spread;
use super::marks::BlackoutPart;
use super::measurement::{Measurement, Mover};

/// The aim: the product's own steps may cost this share of QEMU's own downtime.
pub const AIM: f64 = 0.10;

/// A figure that both movers have, or one of them.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was measured.
    pub what: String,
    /// QEMU alone.
    pub plain: Option<Spread>,
    /// Operator and agents.
    pub product: Option<Spread>,
}

/// What was measured with one number of devices.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// How many devices.
    pub devices: usize,
    /// Blackouts and totals, milliseconds.
    pub figures: Vec<Row>,
    /// The parts of the blackout by the kernels' traces, milliseconds.
    pub parts: Vec<Row>,
    /// The agents' own steps, milliseconds.
    pub steps: Vec<Row>,
    /// By how much the product's median blackout is longer than plain's, milliseconds.
    pub cost_ms: Option<f64>,
    /// The same, as a share of plain's median downtime as QEMU reports it.
    pub cost: Option<f64>,
}

impl Row {
    fn of(
        what: impl Into<String>,
        measurements: &[&Measurement],
        figure: impl Fn(&Measurement) -> Option<f64>,
    ) -> Self {
        let of = |mover| {
            Spread::of(measurements.iter().filter(|one| one.mover == mover).filter_map(|one| figure(one)))
        };
        Self { what: what.into(), plain: of(Mover::Plain), product: of(Mover::Product) }
    }

    /// The product's median divided by plain's.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        self.product?.ratio_to(&self.plain?)
    }

    /// The product's median minus plain's.
    #[must_use]
    pub fn difference(&self) -> Option<f64> {
        Some(self.product?.median - self.plain?.median)
    }
}

/// QEMU's whole milliseconds as a figure.
#[allow(clippy::cast_precision_loss, reason = "no downtime has 2^53 milliseconds")]
fn whole(ms: u64) -> f64 {
    ms as f64
}

impl Summary {
    /// Summarises the migrations with this number of devices.
    #[must_use]
    pub fn of(devices: usize, measurements: &[Measurement]) -> Self {
        let measurements: Vec<&Measurement> =
            measurements.iter().filter(|one| one.devices == devices).collect();
        let blackout = Row::of("blackout: last vCPU run -> first vCPU run", &measurements, |one| {
            Some(one.kernels.blackout_ms)
        });
        let downtime = Row::of("QEMU's own downtime", &measurements, |one| Some(whole(one.qemu.downtime_ms)));
        let cost_ms = blackout.difference();
        let cost = cost_ms.zip(downtime.plain).map(|(cost_ms, downtime)| cost_ms / downtime.median);
        let figures = vec![
            blackout,
            Row::of("devices: first stops -> last RUNNING", &measurements, |one| {
                Some(one.kernels.devices_ms)
            }),
            downtime,
            Row::of("status.timings.blackout", &measurements, |one| Some(one.reported.as_ref()?.blackout_ms)),
            Row::of("total: asked for -> seen to be done", &measurements, |one| Some(one.total_ms)),
            Row::of("QEMU's own total-time", &measurements, |one| Some(whole(one.qemu.total_ms))),
            Row::of("status.timings.total", &measurements, |one| Some(one.reported.as_ref()?.total_ms)),
            Row::of("clocks known to", &measurements, |one| Some(one.kernels.clock_error_ms)),
        ];
        let part = |part: BlackoutPart| {
            let (name, from_to) = part.describe();
            let figure = |one: &Measurement| {
                one.kernels.parts_ms.iter().find(|(own, _)| *own == part).map(|(_, ms)| *ms)
            };
            Row::of(format!("{name:<9} {from_to}"), &measurements, figure)
        };
        let names =
            measurements.iter().find_map(|one| Some(&one.reported.as_ref()?.steps_ms)).into_iter().flatten();
        let step = |(name, _): &(&'static str, f64)| {
            let figure = |one: &Measurement| {
                let found = one.reported.as_ref()?.steps_ms.iter().find(|(own, _)| own == name);
                found.map(|(_, ms)| *ms)
            };
            Row::of(*name, &measurements, figure)
        };
        Self {
            devices,
            figures,
            parts: BlackoutPart::VARIANTS.iter().copied().map(part).collect(),
            steps: names.map(step).collect(),
            cost_ms,
            cost,
        }
    }

    /// Tables for people.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        let mut table = |title: String, rows: &[Row]| {
            let _ = writeln!(
                text,
                "\n{title:<78}  {:>26}  {:>26}  {:>8}  {:>6}",
                "plain QEMU", "Slackwater", "more", "ratio"
            );
            for row in rows {
                let more = row.difference().map(|ms| format!("{ms:+.1}")).unwrap_or_default();
                let ratio = row.ratio().map(|ratio| format!("{ratio:.2}")).unwrap_or_default();
                let (plain, product) = (spread(row.plain), spread(row.product));
                let _ =
                    writeln!(text, "  {:<76}  {plain:>26}  {product:>26}  {more:>8}  {ratio:>6}", row.what);
            }
        };
        table(format!("{} devices, milliseconds: median (least to greatest)", self.devices), &self.figures);
        table("  the parts of the blackout, by the kernels' traces".to_owned(), &self.parts);
        table("  the agents' own steps in it".to_owned(), &self.steps);
        if let (Some(cost_ms), Some(cost)) = (self.cost_ms, self.cost) {
            let aim = AIM * 100.0;
            let met = if cost <= AIM { "met" } else { "not met" };
            let percent = cost * 100.0;
            let _ = writeln!(
                text,
                "  Slackwater's blackout is {cost_ms:+.1} ms: {percent:+.0} % of QEMU's own downtime \
                 (aim: at most {aim:.0} %, {met})"
            );
        }
        text
    }
}

fn spread(figures: Option<Spread>) -> String {
    figures.map(|s| format!("{:.1} ({:.1} to {:.1})", s.median, s.min, s.max)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::marks::Blackout;
    use super::super::measurement::{QemuTimes, ReportedTimes};
    use super::*;

    fn measurement(mover: Mover, blackout_ms: f64, downtime_ms: u64) -> Measurement {
        let reported = ReportedTimes {
            blackout_ms: blackout_ms + 5.0,
            total_ms: 900.0,
            steps_ms: vec![("gate: x", 7.0)],
        };
        Measurement {
            mover,
            devices: 2,
            round: 1,
            from: "node-a".to_owned(),
            kernels: Blackout {
                blackout_ms,
                devices_ms: blackout_ms - 1.0,
                clock_error_ms: 0.2,
                parts_ms: BlackoutPart::VARIANTS.iter().map(|part| (*part, blackout_ms / 8.0)).collect(),
            },
            qemu: QemuTimes { downtime_ms, total_ms: 500 },
            total_ms: 2000.0,
            reported: (mover == Mover::Product).then_some(reported),
        }
    }

    #[test]
    fn the_products_cost_is_its_longer_blackout_divided_by_qemus_own_downtime() {
        let all = [
            measurement(Mover::Plain, 100.0, 80),
            measurement(Mover::Product, 120.0, 110),
            measurement(Mover::Plain, 104.0, 80),
            measurement(Mover::Product, 116.0, 110),
            Measurement { devices: 4, ..measurement(Mover::Product, 9000.0, 9000) },
        ];
        let summary = Summary::of(2, &all);
        assert_eq!(summary.cost_ms, Some(16.0));
        assert_eq!(summary.cost, Some(0.2));
        assert_eq!(summary.figures[0].ratio(), Some(118.0 / 102.0));
        assert_eq!(summary.parts[0].difference(), Some(2.0));
        assert_eq!(summary.steps[0].plain, None);
        let text = summary.to_text();
        assert!(
            text.contains("+16.0 ms: +20 % of QEMU's own downtime (aim: at most 10 %, not met)"),
            "{text}"
        );
        assert!(text.contains("118.0 (116.0 to 120.0)"), "{text}");
    }

    #[test]
    fn where_one_mover_has_no_figure_nothing_is_compared() {
        let summary = Summary::of(2, &[measurement(Mover::Product, 120.0, 110)]);
        assert_eq!((summary.cost_ms, summary.cost), (None, None));
        assert!(!summary.to_text().contains("aim"));
    }
}
