//! Figures from several rounds: the median, and their range.

use serde::Serialize;

/// The figures of several rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// How many.
    pub rounds: usize,
    /// The middle one; of an even number, the middle of the two.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

impl Spread {
    /// Of these figures. `None` if there are none.
    #[must_use]
    pub fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = figures.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let rounds = sorted.len();
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let (below, above) = (sorted.get((rounds - 1) / 2)?, sorted.get(rounds / 2)?);
        Some(Self { rounds, median: f64::midpoint(*below, *above), min, max })
    }

    /// This median divided by the other. `None` if the other is not positive.
    #[must_use]
    pub fn ratio_to(&self, other: &Self) -> Option<f64> {
        (other.median > 0.0).then(|| self.median / other.median)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_whatever_the_order() {
        let odd = Spread::of([9.0, 1.0, 4.0]).unwrap();
        assert_eq!(odd, Spread { rounds: 3, median: 4.0, min: 1.0, max: 9.0 });
        assert_eq!(Spread::of([8.0, 1.0, 4.0, 2.0]).unwrap().median, 3.0);
        assert_eq!(Spread::of([7.0]).unwrap().median, 7.0);
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn a_ratio_is_of_medians() {
        let (slow, fast) = (Spread::of([1.0, 3.0, 90.0]).unwrap(), Spread::of([2.0]).unwrap());
        assert_eq!(slow.ratio_to(&fast), Some(1.5));
        assert_eq!(slow.ratio_to(&Spread::of([0.0]).unwrap()), None);
    }
}
