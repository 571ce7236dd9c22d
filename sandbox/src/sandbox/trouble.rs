//! What follows the host and once cannot: told once, and tried again.

use std::{future::Future, time::Duration};

use crate::{deadline::scaled, error::Error};

/// Between two attempts.
const RETRY: Duration = Duration::from_secs(5);

/// Whether the last attempt failed.
#[derive(Debug, Default)]
pub(super) struct Trouble(bool);

impl Trouble {
    /// Waits for the change; none when there was none, but an attempt is due. Safe to repeat if the
    /// change is safe to cancel.
    pub(super) async fn wait<T>(&self, change: impl Future<Output = T>) -> Option<T> {
        if !self.0 {
            return Some(change.await);
        }
        tokio::time::timeout(scaled(RETRY), change).await.ok()
    }

    /// Notes what came of an attempt. Says the first failure of a row.
    pub(super) fn note(
        &mut self,
        result: Result<(), Error>,
        message: impl FnOnce(&Error) -> String,
    ) {
        if let Err(error) = &result
            && !self.0
        {
            let message = message(error);
            log::warn!("{message}");
        }
        self.0 = result.is_err();
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn after_a_failure_nobody_waits_for_a_change() {
        let mut trouble = Trouble::default();
        assert_eq!(trouble.wait(ready(1)).await, Some(1));
        let quiet = tokio::time::timeout(RETRY * 100, trouble.wait(pending::<()>())).await;
        assert!(quiet.is_err());
        let failure = || Err(Error::Invalid("no".to_owned()));
        let mut said = 0;
        for _ in 0..2 {
            trouble.note(failure(), |error| {
                said += 1;
                error.to_string()
            });
        }
        assert_eq!(said, 1);
        assert_eq!(trouble.wait(pending::<()>()).await, None);
        assert_eq!(trouble.wait(ready(2)).await, Some(2));
        trouble.note(Ok(()), |_| unreachable!());
        let quiet = tokio::time::timeout(RETRY * 100, trouble.wait(pending::<()>())).await;
        assert!(quiet.is_err());
    }
}
