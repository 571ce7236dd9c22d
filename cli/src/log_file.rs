//! The container's output on disk: docker's json-file lines, in files of bounded size.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

/// A file that has reached this is put aside.
const MAX_BYTES: u64 = 10 << 20;

/// Files in all; the oldest goes.
const FILES: usize = 3;

/// Longest piece of a line in one record, as docker has it.
const MAX_LINE: usize = 16 * 1024;

/// One piece of output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// A line with its end, or a piece of one.
    pub log: String,
    /// "stdout" or "stderr".
    pub stream: String,
    /// RFC 3339.
    pub time: String,
}

/// Which of a container's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Writes a container's log.
pub struct Writer {
    path: PathBuf,
    file: File,
    written: u64,
    partial: [Vec<u8>; 2],
}

fn rotated(path: &Path, number: usize) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    if number > 0 {
        name.push(format!(".{number}"));
    }
    name.into()
}

impl Writer {
    /// Begins the log at `path`.
    ///
    /// # Errors
    /// It cannot be created.
    pub fn create(path: &Path) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(path)?;
        let written = file.metadata()?.len();
        Ok(Self {
            path: path.to_owned(),
            file,
            written,
            partial: [Vec::new(), Vec::new()],
        })
    }

    /// Writes output, line by line; the beginning of a line waits for its end.
    ///
    /// # Errors
    /// No space.
    pub fn write(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        let index = usize::from(stream == Stream::Stderr);
        let mut pending = std::mem::take(&mut self.partial[index]);
        pending.extend_from_slice(bytes);
        let time = humantime::format_rfc3339_nanos(SystemTime::now()).to_string();
        let mut records = Vec::new();
        let mut rest = pending.as_slice();
        loop {
            let end = match rest.iter().take(MAX_LINE).position(|byte| *byte == b'\n') {
                Some(end) => end + 1,
                None if rest.len() >= MAX_LINE => MAX_LINE,
                None => break,
            };
            let (line, after) = rest.split_at(end);
            encode(&mut records, stream, line, &time)?;
            rest = after;
        }
        self.partial[index] = rest.to_vec();
        self.append(&records)
    }

    /// Writes what has no end of line and never will.
    ///
    /// # Errors
    /// No space.
    pub fn finish(&mut self) -> io::Result<()> {
        let time = humantime::format_rfc3339_nanos(SystemTime::now()).to_string();
        let mut records = Vec::new();
        for (index, stream) in [Stream::Stdout, Stream::Stderr].into_iter().enumerate() {
            let rest = std::mem::take(&mut self.partial[index]);
            if !rest.is_empty() {
                encode(&mut records, stream, &rest, &time)?;
            }
        }
        self.append(&records)
    }

    fn append(&mut self, records: &[u8]) -> io::Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        if self.written >= MAX_BYTES {
            self.rotate()?;
        }
        self.file.write_all(records)?;
        self.written += records.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        for number in (0..FILES - 1).rev() {
            match fs::rename(rotated(&self.path, number), rotated(&self.path, number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        self.file = File::options().create(true).append(true).open(&self.path)?;
        self.written = 0;
        Ok(())
    }
}

fn encode(records: &mut Vec<u8>, stream: Stream, line: &[u8], time: &str) -> io::Result<()> {
    let record = Record {
        log: String::from_utf8_lossy(line).into_owned(),
        stream: stream.name().to_owned(),
        time: time.to_owned(),
    };
    serde_json::to_writer(&mut *records, &record)?;
    records.push(b'\n');
    Ok(())
}

/// Reads a log from its beginning, and what is added later.
pub struct Reader {
    path: PathBuf,
    /// Files that were put aside before reading began, the oldest last.
    older: Vec<BufReader<File>>,
    current: Option<BufReader<File>>,
    line: String,
}

impl Reader {
    /// Reads the log at `path`.
    ///
    /// # Errors
    /// A file cannot be opened; one that does not exist is an empty log.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut older = Vec::new();
        for number in 1..FILES {
            if let Some(file) = open(&rotated(path, number))? {
                older.push(file);
            }
        }
        Ok(Self {
            path: path.to_owned(),
            older,
            current: open(path)?,
            line: String::new(),
        })
    }

    /// The next record; None = no more at this moment.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn next(&mut self) -> io::Result<Option<Record>> {
        loop {
            let reading_old = !self.older.is_empty();
            let reader = match self.older.last_mut().or(self.current.as_mut()) {
                Some(reader) => reader,
                None => {
                    self.current = open(&self.path)?;
                    match self.current.as_mut() {
                        Some(reader) => reader,
                        None => return Ok(None),
                    }
                }
            };
            let read = reader.read_line(&mut self.line)?;
            if self.line.ends_with('\n') {
                let record = serde_json::from_str(&self.line);
                self.line.clear();
                // A record that a full disk cut is not worth stopping for.
                match record {
                    Ok(record) => return Ok(Some(record)),
                    Err(_) => continue,
                }
            }
            if read > 0 {
                continue;
            }
            if reading_old {
                self.older.pop();
                self.line.clear();
            } else if self.was_put_aside()? {
                self.current = open(&self.path)?;
                self.line.clear();
            } else {
                return Ok(None);
            }
        }
    }

    fn was_put_aside(&self) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt;
        let (Some(current), Ok(named)) = (&self.current, fs::metadata(&self.path)) else {
            return Ok(false);
        };
        Ok(current.get_ref().metadata()?.ino() != named.ino())
    }
}

fn open(path: &Path) -> io::Result<Option<BufReader<File>>> {
    match File::open(path) {
        Ok(file) => Ok(Some(BufReader::new(file))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(reader: &mut Reader) -> Vec<(String, String)> {
        std::iter::from_fn(|| reader.next().unwrap())
            .map(|record| (record.stream, record.log))
            .collect()
    }

    #[test]
    fn lines_pieces_and_the_rest() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut writer = Writer::create(&path).unwrap();
        let mut reader = Reader::open(&path).unwrap();
        writer.write(Stream::Stdout, b"on").unwrap();
        assert!(all(&mut reader).is_empty());
        writer.write(Stream::Stderr, b"err\n").unwrap();
        writer.write(Stream::Stdout, b"e\ntwo").unwrap();
        let seen = all(&mut reader);
        assert_eq!(
            seen,
            [
                ("stderr".to_owned(), "err\n".to_owned()),
                ("stdout".to_owned(), "one\n".to_owned())
            ]
        );
        writer.write(Stream::Stdout, &vec![b'x'; MAX_LINE]).unwrap();
        writer.finish().unwrap();
        let seen = all(&mut reader);
        assert_eq!(
            seen.iter().map(|(_, log)| log.len()).collect::<Vec<_>>(),
            [MAX_LINE, 3]
        );
    }

    #[test]
    fn old_files_go_and_a_reader_follows() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut writer = Writer::create(&path).unwrap();
        let mut follower = Reader::open(&path).unwrap();
        let line = [&[b'y'; 1000][..], b"\n"].concat();
        let mut seen = 0;
        for _ in 0..40_000 {
            writer.write(Stream::Stdout, &line).unwrap();
            while follower.next().unwrap().is_some() {
                seen += 1;
            }
        }
        assert_eq!(seen, 40_000);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), FILES);
        let total: u64 = (0..FILES)
            .map(|n| fs::metadata(rotated(&path, n)).unwrap().len())
            .sum();
        assert!(total <= FILES as u64 * (MAX_BYTES + 2000), "{total}");
        let kept = all(&mut Reader::open(&path).unwrap()).len();
        assert!(kept > 18_000 && kept < 40_000, "{kept}");
    }
}
