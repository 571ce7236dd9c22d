//! A registry in this process that can be told to misbehave.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use caisson_rootfs_builder::Digest;
use serde_json::{Value, json};

/// What was asked.
#[derive(Debug, Clone)]
pub struct Asked {
    pub method: String,
    pub path: String,
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl Asked {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// What is answered.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Instead of the body's length; `None` = say nothing and end by closing.
    pub length: Option<u64>,
    /// The connection is closed after so many bytes.
    pub cut: Option<usize>,
    /// The body is repeated for ever.
    pub endless: bool,
    /// Before anything is sent.
    pub delay: Duration,
}

impl Reply {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self {
            status,
            headers: Vec::new(),
            length: Some(body.len() as u64),
            body,
            cut: None,
            endless: false,
            delay: Duration::ZERO,
        }
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn error(status: u16, message: &str) -> Self {
        let json = json!({"errors": [{"code": "X", "message": message}]});
        Self::new(status, json.to_string())
    }
}

type Handler = dyn Fn(&Asked) -> Option<Reply> + Send + Sync;

/// A repository's manifests and blobs, served on loopback.
#[derive(Clone)]
pub struct Registry {
    pub host: String,
    pub content: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
    pub asked: Arc<Mutex<Vec<Asked>>>,
}

impl Registry {
    /// Serves until the process ends; `handler` answers what it does not leave to the registry.
    pub fn start(handler: impl Fn(&Asked) -> Option<Reply> + Send + Sync + 'static) -> Registry {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let registry = Registry {
            host: listener.local_addr().unwrap().to_string(),
            content: Arc::default(),
            asked: Arc::default(),
        };
        let handler: Arc<Handler> = Arc::new(handler);
        let served = registry.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (served, handler) = (served.clone(), handler.clone());
                // Whoever goes away in the middle of an answer is no concern of the registry's.
                thread::spawn(move || served.serve(&stream, &*handler));
            }
        });
        registry
    }

    pub fn plain() -> Registry {
        Self::start(|_| None)
    }

    fn serve(&self, stream: &TcpStream, handler: &Handler) -> Option<()> {
        let mut reader = BufReader::new(stream);
        loop {
            let mut line = String::new();
            // A TLS handshake is no text.
            reader.read_line(&mut line).ok().filter(|&n| n > 0)?;
            let mut words = line.split_whitespace();
            let mut asked = Asked {
                method: words.next()?.to_owned(),
                path: words.next()?.to_owned(),
                headers: BTreeMap::new(),
                body: String::new(),
            };
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).ok()?;
                let Some((name, value)) = line.trim_end().split_once(": ") else {
                    break;
                };
                asked
                    .headers
                    .insert(name.to_ascii_lowercase(), value.to_owned());
            }
            let length = asked
                .header("content-length")
                .map_or(0, |n| n.parse().unwrap());
            let mut body = vec![0; length];
            reader.read_exact(&mut body).ok()?;
            asked.body = String::from_utf8(body).ok()?;
            self.asked.lock().unwrap().push(asked.clone());
            let reply = handler(&asked).unwrap_or_else(|| self.reply(&asked));
            send(stream, &reply)?;
        }
    }

    fn reply(&self, asked: &Asked) -> Reply {
        if asked.path == "/v2/" {
            return Reply::new(200, "{}");
        }
        let content = self.content.lock().unwrap();
        let Some(body) = content.get(&asked.path) else {
            return Reply::error(404, "unknown to the registry");
        };
        let from = asked.header("range").and_then(|range| {
            range
                .strip_prefix("bytes=")?
                .strip_suffix('-')?
                .parse()
                .ok()
        });
        match from {
            Some(from) => {
                let last = body.len() - 1;
                Reply::new(206, &body[from..]).header(
                    "Content-Range",
                    &format!("bytes {from}-{last}/{}", body.len()),
                )
            }
            None => Reply::new(200, body.clone()),
        }
    }

    /// The requests for paths with this in them.
    pub fn asked_for(&self, part: &str) -> Vec<Asked> {
        let asked = self.asked.lock().unwrap();
        let matching = asked.iter().filter(|asked| asked.path.contains(part));
        matching.cloned().collect()
    }

    pub fn put_blob(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let path = format!("/v2/library/app/blobs/{digest}");
        self.content.lock().unwrap().insert(path, bytes.to_vec());
        digest
    }

    pub fn put_manifest(&self, tag: Option<&str>, manifest: &Value) -> Digest {
        let bytes = manifest.to_string().into_bytes();
        let digest = Digest::of(&bytes);
        let mut content = self.content.lock().unwrap();
        for name in tag
            .into_iter()
            .map(str::to_owned)
            .chain([digest.to_string()])
        {
            content.insert(format!("/v2/library/app/manifests/{name}"), bytes.clone());
        }
        digest
    }

    /// An image of one file a layer; its manifest's digest and its layers'.
    pub fn put_image(&self, tag: Option<&str>, files: &[&[u8]]) -> (Digest, Vec<Digest>) {
        let tars: Vec<Vec<u8>> = files.iter().map(|file| tar(file)).collect();
        let diff_ids: Vec<Digest> = tars.iter().map(|tar| Digest::of(tar)).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        })
        .to_string();
        let mut layers = Vec::new();
        let descriptors: Vec<Value> = tars
            .iter()
            .map(|tar| {
                let blob = gzip(tar);
                let digest = self.put_blob(&blob);
                layers.push(digest);
                json!({
                    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                    "digest": digest, "size": blob.len(),
                })
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": self.put_blob(config.as_bytes()), "size": config.len(),
            },
            "layers": descriptors,
        });
        (self.put_manifest(tag, &manifest), layers)
    }

    pub fn blob_len(&self, digest: &Digest) -> usize {
        self.content.lock().unwrap()[&format!("/v2/library/app/blobs/{digest}")].len()
    }
}

fn send(mut stream: &TcpStream, reply: &Reply) -> Option<()> {
    thread::sleep(reply.delay);
    let mut head = format!("HTTP/1.1 {} X\r\n", reply.status);
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    match reply.length {
        Some(length) => head.push_str(&format!("Content-Length: {length}\r\n")),
        None => head.push_str("Connection: close\r\n"),
    }
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(b"\r\n").ok()?;
    let end = reply.cut.unwrap_or(reply.body.len()).min(reply.body.len());
    stream.write_all(&reply.body[..end]).ok()?;
    if reply.endless {
        loop {
            stream.write_all(&reply.body).ok()?;
        }
    }
    let whole = reply.length == Some(end as u64);
    whole.then_some(())
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A tar archive of one file (POSIX.1, ustar).
fn tar(content: &[u8]) -> Vec<u8> {
    let mut header = [0_u8; 512];
    let mut put =
        |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, "file");
    put(100, "0000644\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{:011o}\0", content.len()));
    put(136, "00000000000\0");
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\x0000");
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut tar = header.to_vec();
    tar.extend_from_slice(content);
    tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
    tar
}
