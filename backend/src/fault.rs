//! Places where a test may kill the daemon, compiled in by the feature `fault-points` only.
//!
//! `GEMINI_FAULT=release.fetched:3` makes the daemon kill itself at the third passage of that
//! place. The places are `{prepare,release,renew,trim}.{fetched,done,published}`: the request was
//! taken from the ring, its work is done, its answer is visible to the driver.

/// Passes a place.
#[cfg(not(feature = "fault-points"))]
#[inline]
pub fn point(_place: &str) {}

/// Passes a place.
#[cfg(feature = "fault-points")]
pub fn point(place: &str) {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::LazyLock;

    static PASSED: AtomicU64 = AtomicU64::new(0);
    static FAULT: LazyLock<Option<(String, u64)>> = LazyLock::new(|| {
        let value = std::env::var("GEMINI_FAULT").ok()?;
        let (place, nth) = value.rsplit_once(':')?;
        Some((place.to_owned(), nth.parse().ok()?))
    });
    if let Some((armed, nth)) = &*FAULT {
        if armed == place && PASSED.fetch_add(1, Ordering::SeqCst) + 1 == *nth {
            crate::backing::kill_self();
        }
    }
}
