//! A real registry on loopback: Debian's `docker-registry`, with or without TLS and passwords.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;

use serde_json::Value;

use crate::command::{Command, Running};
use crate::deadline::{seconds, until};
use crate::image::{Image, hex};

/// A user of registries with passwords.
pub const USER: &str = "tests";
/// That user's password.
pub const PASSWORD: &str = "open sesame";
/// Its bcrypt hash, as registries want it.
const HASH: &str = "$2b$05$DFGOmfiJbucSVkgJP1mJceCpNKkeeuGL1aClopsHDbppBzpKPylca";

/// A running registry; it ends when this is dropped.
pub struct Registry {
    /// Host and port.
    pub host: String,
    process: Option<Running>,
}

impl Registry {
    /// Serves the images in `directory` by plain HTTP.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn plain(directory: &Path) -> Self {
        Self::start(directory, "plain", "", "")
    }

    /// Serves the images in `directory` by HTTPS to [`USER`] alone, with a certificate of an authority
    /// that is made for it; gives the file with that authority's certificate too.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn secure(directory: &Path) -> (Self, String) {
        let (authority, certificate, key) = certificates(directory);
        let passwords = directory.join("htpasswd");
        fs::write(&passwords, format!("{USER}:{HASH}\n")).expect("write the passwords");
        let tls = format!("  tls: {{ certificate: {certificate}, key: {key} }}\n");
        let auth = format!(
            "auth:\n  htpasswd: {{ realm: tests, path: {} }}\n",
            passwords.display()
        );
        (Self::start(directory, "secure", &tls, &auth), authority)
    }

    fn start(directory: &Path, name: &str, tls: &str, auth: &str) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let host = free.local_addr().expect("its number").to_string();
        drop(free);
        let storage = directory.join("storage");
        fs::create_dir_all(&storage).expect("make the storage");
        let config = directory.join(format!("{name}.yml"));
        let text = format!(
            "version: 0.1\nlog: {{ level: error }}\nhttp:\n  addr: {host}\n{tls}\
             storage:\n  filesystem: {{ rootdirectory: {} }}\n{auth}",
            storage.display()
        );
        fs::write(&config, text).expect("write the registry's configuration");
        let words = [
            "docker-registry".to_owned(),
            "serve".to_owned(),
            config.display().to_string(),
        ];
        let mut process = Command::new(words).within(600.0).start();
        let up = until(seconds(10.0), || {
            (TcpStream::connect(&host).is_ok() || !process.is_running()).then_some(())
        });
        assert!(
            up.is_some() && process.is_running(),
            "docker-registry does not come up at {host}"
        );
        Self {
            host,
            process: Some(process),
        }
    }

    /// Puts an image there, by its name without a registry; gives its manifest's digest.
    ///
    /// # Panics
    /// If the registry refuses it.
    pub fn push(&self, image: &Image, repository: &str, tag: &str) -> String {
        let layout = tempfile::tempdir().expect("a scratch directory");
        image.write_layout(layout.path());
        let read = |path: &str| fs::read(layout.path().join(path)).expect("read back");
        let index: Value = serde_json::from_slice(&read("index.json")).expect("JSON");
        let digest = index["manifests"][0]["digest"].as_str().expect("a digest");
        let blob = |digest: &str| read(&format!("blobs/sha256/{}", &digest["sha256:".len()..]));
        let manifest = blob(digest);
        let parsed: Value = serde_json::from_slice(&manifest).expect("JSON");
        let layers = parsed["layers"].as_array().expect("layers");
        for descriptor in layers.iter().chain([&parsed["config"]]) {
            let digest = descriptor["digest"].as_str().expect("a digest");
            self.push_blob(repository, digest, &blob(digest));
        }
        let media_type = parsed["mediaType"].as_str().expect("a media type");
        self.push_manifest(repository, tag, media_type, &manifest);
        digest.to_owned()
    }

    fn push_blob(&self, repository: &str, digest: &str, bytes: &[u8]) {
        let path = format!("/v2/{repository}/blobs/uploads/");
        let (status, head) = self.request("POST", &path, "text/plain", &[]);
        assert_eq!(status, 202, "{head}");
        let location = head
            .lines()
            .find_map(|line| line.strip_prefix("Location: "))
            .expect("a place for the blob");
        let path = location.trim_start_matches(&format!("http://{}", self.host));
        let path = format!("{path}&digest={digest}");
        let (status, head) = self.request("PUT", &path, "application/octet-stream", bytes);
        assert_eq!(status, 201, "{head}");
    }

    /// Puts a manifest or an index there, whose parts are there; gives its digest.
    ///
    /// # Panics
    /// If the registry refuses it.
    pub fn push_manifest(
        &self,
        repository: &str,
        tag: &str,
        media_type: &str,
        bytes: &[u8],
    ) -> String {
        let path = format!("/v2/{repository}/manifests/{tag}");
        let (status, head) = self.request("PUT", &path, media_type, bytes);
        assert_eq!(status, 201, "{head}");
        format!("sha256:{}", hex(bytes))
    }

    /// One request on a connection of its own: status, and the answer's head.
    fn request(&self, method: &str, path: &str, media_type: &str, body: &[u8]) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.host).expect("connect to the registry");
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: {media_type}\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n",
            self.host,
            body.len()
        );
        stream.write_all(head.as_bytes()).expect("ask the registry");
        stream.write_all(body).expect("ask the registry");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("its answer");
        let answer = String::from_utf8_lossy(&answer).replace("\r\n", "\n");
        let status = answer
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        (status.expect("a status"), answer)
    }

    /// Ends it.
    pub fn stop(&mut self) {
        if let Some(process) = self.process.take() {
            process.signal(rustix::process::Signal::KILL);
            process.finish();
        }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The authority's certificate, and the registry's with its key, made by openssl.
fn certificates(directory: &Path) -> (String, String, String) {
    let path = |name: &str| directory.join(name).display().to_string();
    let script = format!(
        "cd '{}' && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 \
           -subj '/CN=Tests authority' -keyout ca.key -out ca.crt && \
         openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
           -subj '/CN=127.0.0.1' -keyout server.key -out server.csr && \
         printf 'subjectAltName=IP:127.0.0.1\\nextendedKeyUsage=serverAuth\\n' > server.ext && \
         openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 \
           -extfile server.ext -out server.crt",
        directory.display()
    );
    Command::new(["sh", "-c", &script]).run().ok();
    (path("ca.crt"), path("server.crt"), path("server.key"))
}
