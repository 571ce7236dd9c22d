//! The transfer of one blob: streamed to a file, resumed where it broke.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use caisson_rootfs_builder::{BlobRef, Digest};
use reqwest::header::CONTENT_RANGE;
use reqwest::{Response, StatusCode};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};
use crate::session::Session;

/// Transfers of one blob that may break before we give up.
const MOST_FAILURES: u32 = 6;

/// A blob that is being written.
struct Part {
    path: PathBuf,
    file: File,
    hasher: Sha256,
    written: u64,
    resumed: bool,
}

impl Part {
    fn create(path: PathBuf) -> Result<Self> {
        let file = File::create(&path).map_err(|source| Error::Io {
            action: "create",
            path: path.clone(),
            source,
        })?;
        Ok(Self {
            path,
            file,
            hasher: Sha256::new(),
            written: 0,
            resumed: false,
        })
    }

    fn failed(&self) -> impl FnOnce(std::io::Error) -> Error {
        let path = self.path.clone();
        move |source| Error::Io {
            action: "write",
            path,
            source,
        }
    }

    fn restart(&mut self) -> Result<()> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .map_err(self.failed())?;
        self.hasher = Sha256::new();
        self.written = 0;
        self.resumed = false;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(self.failed())?;
        self.hasher.update(bytes);
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn digest(&self) -> Option<Digest> {
        let bytes = self.hasher.clone().finalize();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("sha256:{hex}").parse().ok()
    }
}

impl Session<'_> {
    /// Brings a blob to `target`, whole and verified; `written` is told how many bytes of it are there.
    pub async fn fetch(
        &self,
        repository: &str,
        blob: &BlobRef,
        directory: &Path,
        target: &Path,
        written: &dyn Fn(u64),
    ) -> Result<()> {
        let mut part = Part::create(directory.join(format!("part-{}", blob.digest.hex())))?;
        let path = format!("{repository}/blobs/{}", blob.digest);
        let mut failures = 0;
        let mut wait = self.backoff();
        loop {
            let error = match self.transfer(&path, blob, &mut part, written).await {
                Ok(()) => break,
                Err(error) => error,
            };
            failures += 1;
            // What was put together of two answers may be of two contents.
            let mixed = part.resumed && matches!(error, Error::Digest { .. });
            if failures >= MOST_FAILURES || !(error.is_transient() || mixed) {
                return Err(error);
            }
            if mixed {
                part.restart()?;
            }
            tokio::time::sleep(wait).await;
            wait = wait.saturating_mul(2);
        }
        fs::rename(&part.path, target).map_err(|source| Error::Io {
            action: "rename",
            path: target.to_owned(),
            source,
        })
    }

    /// One request for all that is missing.
    async fn transfer(
        &self,
        path: &str,
        blob: &BlobRef,
        part: &mut Part,
        written: &dyn Fn(u64),
    ) -> Result<()> {
        if part.written < blob.size || blob.size == 0 {
            let what = blob.digest.to_string();
            let from = (part.written > 0).then_some(part.written);
            let mut response = match self.get(path, &what, None, from).await {
                Err(Error::Status { status: 416, .. }) if from.is_some() => {
                    part.restart()?;
                    self.get(path, &what, None, None).await?
                }
                other => other?,
            };
            if response.status() == StatusCode::PARTIAL_CONTENT {
                if range_start(&response) != Some(part.written) {
                    return Err(Error::Protocol {
                        registry: self.host.clone(),
                        what,
                        reason: "it sends another part than was asked for".to_owned(),
                    });
                }
                part.resumed = true;
            } else if part.written > 0 {
                part.restart()?;
            }
            let wrong_size = |found| Error::Size {
                registry: self.host.clone(),
                digest: blob.digest,
                expected: blob.size,
                found,
            };
            if let Some(length) = response.content_length()
                && part.written.saturating_add(length) != blob.size
            {
                return Err(wrong_size(part.written.saturating_add(length)));
            }
            while let Some(chunk) = self.chunk(&mut response, &what).await? {
                let end = part.written + chunk.len() as u64;
                if end > blob.size {
                    return Err(wrong_size(end));
                }
                part.write(&chunk)?;
                written(part.written);
            }
            if part.written < blob.size {
                return Err(Error::Broken {
                    registry: self.host.clone(),
                    what,
                    reason: format!("it ended after {} of {} bytes", part.written, blob.size),
                });
            }
        }
        match part.digest() {
            Some(actual) if actual == blob.digest => Ok(()),
            actual => Err(Error::Digest {
                registry: self.host.clone(),
                expected: blob.digest,
                actual: actual.unwrap_or(blob.digest),
            }),
        }
    }
}

/// The first byte of a part, by its `Content-Range` (RFC 9110, 14.4).
fn range_start(response: &Response) -> Option<u64> {
    let value = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    value
        .strip_prefix("bytes ")?
        .split('-')
        .next()?
        .parse()
        .ok()
}
