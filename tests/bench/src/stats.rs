//! Order statistics of a series of measurements.

/// Median, 99th percentile and extremes of a series.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// Number of measurements.
    pub count: usize,
    /// Middle value (mean of the two middle ones of an even series).
    pub median: f64,
    /// 99th percentile by nearest rank: the maximum of a series shorter than 100.
    pub p99: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

/// Summarises a series; None when it is empty.
pub fn summarise(series: &[f64]) -> Option<Summary> {
    let mut sorted = series.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (&min, &max) = (sorted.first()?, sorted.last()?);
    let count = sorted.len();
    let middle = count / 2;
    let median = if count % 2 == 1 {
        sorted[middle]
    } else {
        (sorted[middle - 1] + sorted[middle]) / 2.0
    };
    // Nearest rank: the smallest value with at least 99 % of the series at or below it.
    let rank = (count * 99).div_ceil(100);
    Some(Summary {
        count,
        median,
        p99: sorted[rank - 1],
        min,
        max,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_series_has_no_summary() {
        assert_eq!(summarise(&[]), None);
    }

    #[test]
    fn order_does_not_matter() {
        let odd = summarise(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!(
            (odd.median, odd.p99, odd.min, odd.max),
            (2.0, 3.0, 1.0, 3.0)
        );
        assert_eq!(summarise(&[4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
    }

    #[test]
    fn p99_is_by_nearest_rank() {
        let series: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(summarise(&series).unwrap().p99, 198.0);
        assert_eq!(summarise(&series[..100]).unwrap().p99, 99.0);
        assert_eq!(summarise(&series[..20]).unwrap().p99, 20.0);
    }
}
