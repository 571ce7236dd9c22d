//! Images from a real registry on loopback: `pull`, `run --pull`, `login`, mirrors, TLS.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use caisson_tests::registry::{PASSWORD, USER};
use caisson_tests::{Command, Host, Image, Layer, Registry};
use serde_json::{Value, json};

/// A registry without TLS and what it serves.
struct Bench {
    registry: Registry,
    directory: PathBuf,
    host: Host,
}

impl Bench {
    fn claim() -> Self {
        let host = Host::claim();
        let directory = host.scratch().join("registry");
        fs::create_dir(&directory).unwrap();
        Self {
            registry: Registry::plain(&directory),
            directory,
            host,
        }
    }

    /// The name of an image there.
    fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.registry.host)
    }

    /// A `caisson` command that finds docker's configuration and certificates in the scratch directory.
    fn caisson(&self, words: &str) -> Command {
        let own = |name: &str| {
            let path = self.host.scratch().join(name);
            fs::create_dir_all(&path).unwrap();
            path.display().to_string()
        };
        let script = format!(
            "mkdir -p /etc/docker/certs.d /etc/caisson && mount --bind '{}' /etc/docker/certs.d && \
             mount --bind '{}' /etc/caisson && exec '{}' {words}",
            own("certs.d"),
            own("etc"),
            self.host.program().display()
        );
        let path = std::env::var("PATH").unwrap_or_default();
        Command::new(["unshare", "-m", "sh", "-c", &script])
            .env("DOCKER_CONFIG", own("docker"))
            .env("PATH", format!("{}:{path}", own("helpers")))
    }
}

fn image(say: &str) -> Image {
    Image::busybox("x")
        .layer(Layer::new().file("say", 0o644, say))
        .config("Cmd", json!(["cat", "/say"]))
}

#[test]
fn images_are_pulled_when_they_are_missing_or_asked_for() {
    let bench = Bench::claim();
    let (host, name) = (&bench.host, bench.name("team/app:1"));
    host.caisson(["run", "--rm", "--pull", "never", &name])
        .expect_error(&["no such image", &name])
        .expect_code(125);
    host.caisson(["run", "--rm", &name])
        .expect_error(&["no such image", "has no", "team/app:1"])
        .expect_code(125);

    let digest = bench.registry.push(&image("first\n"), "team/app", "1");
    let ran = host.caisson(["run", "--rm", &name]);
    assert!(ran.stderr().contains("Unable to find image"), "{ran}");
    assert!(ran.stderr().contains(&format!("Digest: {digest}")), "{ran}");
    ran.expect_stdout("first\n");
    host.caisson(["pull", &name])
        .ok()
        .expect_in_stdout(&format!("Status: Image is up to date for {name}"));

    // The tag means another image now, which only `always` looks for.
    bench.registry.push(&image("second\n"), "team/app", "1");
    host.caisson(["run", "--rm", &name])
        .expect_stdout("first\n");
    let ran = host.caisson(["run", "--rm", "--pull", "always", "-q", &name]);
    assert_eq!(ran.stderr(), "", "{ran}");
    ran.expect_stdout("second\n");
    // The old one is found by its digest, until it is pruned.
    let by_digest = bench.name(&format!("team/app@{digest}"));
    host.caisson(["run", "--rm", "--pull", "never", &by_digest])
        .expect_stdout("first\n");
    host.caisson(["image", "prune", "-f"])
        .ok()
        .expect_in_stdout(&format!("untagged: {by_digest}"))
        .expect_in_stdout("Total reclaimed space: ");
    host.caisson(["run", "--rm", "--pull", "never", &by_digest])
        .expect_error(&["no such image"])
        .expect_code(125);
    host.caisson(["image", "rm", &name]).ok();
}

#[test]
fn digests_platforms_and_layers_are_as_the_registry_says() {
    let bench = Bench::claim();
    let host = &bench.host;
    let ours = bench.registry.push(&image("ours\n"), "app", "amd64");
    let mut other = image("theirs\n");
    other.config["Labels"] = json!({ "not": "ours" });
    let theirs = bench.registry.push(&other, "app", "arm64");
    let entry = |digest: &str, architecture: &str| {
        let path = format!(
            "docker/registry/v2/blobs/sha256/{}/{}/data",
            &digest[7..9],
            &digest[7..]
        );
        let size = fs::metadata(bench.directory.join("storage").join(path))
            .unwrap()
            .len();
        json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": size,
            "platform": { "os": "linux", "architecture": architecture },
        })
    };
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = json!({
        "schemaVersion": 2, "mediaType": media_type,
        "manifests": [entry(&theirs, "arm64"), entry(&ours, "amd64")],
    });
    let index =
        bench
            .registry
            .push_manifest("app", "latest", media_type, index.to_string().as_bytes());

    let name = bench.name("app");
    let pulled = host
        .caisson(["pull", "--platform", "linux/amd64", &name])
        .ok();
    for line in [
        "Using default tag: latest\n",
        ": Pulling fs layer\n",
        ": Pull complete\n",
        &format!("Digest: {index}\n"),
        &format!("Status: Downloaded newer image for {name}:latest\n{name}:latest\n"),
    ] {
        assert!(pulled.stdout().contains(line), "{line}{pulled}");
    }
    host.caisson(["run", "--rm", &name]).expect_stdout("ours\n");
    let inspected = host.caisson(["image", "inspect", &name]).ok().json();
    assert_eq!(
        inspected[0]["RepoDigests"],
        json!([format!("{name}@{index}")])
    );
    // By the digest of the manifest itself; its layers are here already.
    let exact = format!("{name}@{ours}");
    host.caisson(["pull", "-q", &exact])
        .expect_stdout(&format!("{exact}\n"));
    host.caisson(["rmi", &name]).ok();
    let wrong = format!("{name}@sha256:{}", "0".repeat(64));
    host.caisson(["pull", &wrong])
        .expect_error(&["has no", &"0".repeat(64)])
        .expect_code(1);
    host.caisson(["pull", "--platform", "linux/arm64", &name])
        .expect_error(&["linux/arm64", "linux/amd64"])
        .expect_code(125);
}

#[test]
fn a_private_registry_wants_trust_and_a_password() {
    let bench = Bench::claim();
    bench.registry.push(&image("secret\n"), "app", "1");
    let (secure, authority) = Registry::secure(&bench.directory);
    let host = &secure.host;
    let pull = format!("pull -q {host}/app:1");
    bench
        .caisson(&pull)
        .run()
        .expect_error(&["cannot trust", "certs.d"])
        .expect_code(1);
    let trusted = bench.host.scratch().join("certs.d").join(host);
    fs::create_dir_all(&trusted).unwrap();
    fs::copy(&authority, trusted.join("ca.crt")).unwrap();
    let advice = format!("caisson login {host}");
    bench
        .caisson(&pull)
        .run()
        .expect_error(&[&advice])
        .expect_code(1);

    let login = format!("login -u {USER} --password-stdin {host}");
    bench
        .caisson(&login)
        .stdin("guess\n")
        .run()
        .expect_error(&["refuses the user name or password"])
        .expect_code(1);
    bench
        .caisson(&login)
        .stdin(format!("{PASSWORD}\n"))
        .run()
        .ok()
        .expect_stdout("Login Succeeded\n");
    let file = bench.host.scratch().join("docker/config.json");
    let mode = fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    bench.caisson(&pull).run().ok();
    bench.caisson(&format!("rmi {host}/app:1")).run().ok();
    let logout = format!("logout {host}");
    bench
        .caisson(&logout)
        .run()
        .ok()
        .expect_in_stdout("Removing");
    bench
        .caisson(&pull)
        .run()
        .expect_error(&[&advice])
        .expect_code(1);

    // A helper keeps it instead, and nothing of it is in the file.
    let helpers = bench.host.scratch().join("helpers");
    let helper = helpers.join("docker-credential-tests");
    let script = format!(
        "#!/bin/sh\nf='{}/kept'\ncase $1 in\nstore) cat > $f ;;\n\
         get) cat > /dev/null; [ -e $f ] && cat $f || {{ echo 'credentials not found in native keychain'; exit 1; }} ;;\n\
         erase) rm $f ;;\nesac\n",
        helpers.display()
    );
    fs::write(&helper, script).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(
        &file,
        "{\"credsStore\": \"tests\", \"detachKeys\": \"ctrl-e\"}",
    )
    .unwrap();
    bench.caisson(&login).stdin(PASSWORD).run().ok();
    let kept: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(kept["auths"], json!({ host: {} }));
    assert_eq!(kept["detachKeys"], "ctrl-e");
    bench.caisson(&pull).run().ok();
    bench.caisson(&format!("rmi {host}/app:1")).run().ok();
    bench.caisson(&logout).run().ok();
    assert!(!helpers.join("kept").exists());
}

#[test]
fn mirrors_are_asked_first_and_dead_ones_passed_over() {
    let bench = Bench::claim();
    bench
        .registry
        .push(&image("by mirror\n"), "library/app", "1");
    let etc = bench.host.scratch().join("etc");
    fs::create_dir_all(&etc).unwrap();
    let config = |mirrors: &str| {
        let text = format!("[registries.\"docker.io\"]\nmirrors = [{mirrors}]\n");
        fs::write(etc.join("config.toml"), text).unwrap();
    };
    let alive = format!("\"http://{}\"", bench.registry.host);
    config(&format!("\"http://127.0.0.1:1\", {alive}"));
    bench
        .caisson("pull app:1")
        .run()
        .ok()
        .expect_in_stdout("Status: Downloaded newer image for app:1\ndocker.io/library/app:1\n");
    bench
        .host
        .caisson(["run", "--rm", "app:1"])
        .expect_stdout("by mirror\n");
    bench.host.caisson(["rmi", "app:1"]).ok();
    config("\"ftp://x\"");
    bench
        .caisson("pull app:1")
        .run()
        .expect_error(&["config.toml:1", "ftp://x"])
        .expect_code(1);
}

#[test]
fn a_registry_that_is_gone_is_told_at_once() {
    let mut bench = Bench::claim();
    bench.registry.push(&image("gone\n"), "app", "1");
    let name = bench.name("app:1");
    let mut terminal = bench.host.terminal(["pull", &name]);
    terminal.expect("Downloading [");
    terminal.expect(": Pull complete");
    assert_eq!(terminal.finish(), 0);
    bench.host.caisson(["rmi", &name]).ok();
    bench.registry.stop();
    bench
        .host
        .caisson(["pull", &name])
        .expect_error(&["cannot reach", &bench.registry.host])
        .expect_code(1);
    bench
        .host
        .caisson(["pull", "No Reference"])
        .expect_error(&["invalid image reference"])
        .expect_code(1);
}

#[test]
fn saved_images_are_the_same_elsewhere() {
    // Makes its locks, which it keeps.
    Command::new(["podman", "ps"]).run().ok();
    let bench = Bench::claim();
    let (host, name) = (&bench.host, bench.name("team/app:1"));
    bench.registry.push(&image("saved\n"), "team/app", "1");
    host.caisson(["pull", "-q", &name]).ok();
    let told = |what: &str| host.caisson(["image", "inspect", &name]).ok().json()[0][what].take();
    let (id, layers) = (told("Id"), told("RootFS"));
    let archive = host.scratch().join("saved.tar");
    let path = archive.to_str().unwrap();
    host.caisson(["save", "-o", path, &name]).ok();
    assert_eq!(
        host.caisson(["save", &name]).ok().stdout_bytes(),
        fs::read(&archive).unwrap()
    );

    // docker's and podman's reader, in a storage of its own, and back by the registry.
    let storage = |name: &str| host.scratch().join(name).display().to_string();
    let podman = |words: &[&str]| {
        let (root, run) = (storage("root"), storage("run"));
        let own = ["podman", "--root", &root, "--runroot", &run];
        Command::new([&own, words].concat()).within(60.0).run()
    };
    podman(&["load", "-q", "-i", path]).ok();
    let theirs = podman(&["image", "inspect", &name]).ok().json();
    assert_eq!(theirs[0]["RootFS"]["Layers"], layers["Layers"]);
    let copy = bench.name("team/copy:1");
    podman(&["push", "-q", "--tls-verify=false", &name, &copy]).ok();
    let _ = rustix::mount::unmount(
        host.scratch().join("root/overlay"),
        rustix::mount::UnmountFlags::DETACH,
    );
    host.caisson(["pull", "-q", &copy]).ok();
    let copied = host.caisson(["image", "inspect", &copy]).ok().json();
    assert_eq!(copied[0]["Id"], id);
    host.caisson(["rmi", &copy]).ok();

    host.caisson(["rmi", &name]).ok();
    host.caisson(["load", "-i", path])
        .ok()
        .expect_in_stdout(&name);
    assert_eq!((told("Id"), told("RootFS")), (id, layers));
    host.caisson(["run", "--rm", "--pull", "never", &name])
        .expect_stdout("saved\n");
    host.caisson(["rmi", &name]).ok();

    let before = fs::read(&archive).unwrap();
    host.caisson(["save", "-o", path, &name])
        .expect_error(&["no such image", &name])
        .expect_code(1);
    assert_eq!(fs::read(&archive).unwrap(), before);
    host.caisson(["save", "-o", "/no/such/file", host.busybox()])
        .expect_error(&["/no/such/file"])
        .expect_code(1);
    host.caisson(["save", "-o", "/dev/full", host.busybox()])
        .expect_error(&["/dev/full"])
        .expect_code(1);
    let mut terminal = host.terminal(["save", host.busybox()]);
    terminal.expect("terminal");
    assert_eq!(terminal.finish(), 125);
}
