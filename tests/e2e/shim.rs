//! The shim's verbs and its Task service, called as containerd calls them, but with what no
//! containerd of the tests says: the parameters of 2.3, and bundles that are broken.

use std::{
    fs,
    path::{Path, PathBuf},
};

use caisson_tests::{Command, Finished, Host, seconds, until};
use containerd_shim_protos::{
    Client, TaskClient,
    api::{
        CreateTaskRequest, DeleteRequest, ShutdownRequest, StartRequest, StateRequest, WaitRequest,
    },
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::Message,
    ttrpc::context::{Context, with_duration},
};

use serde_json::{Value, json};

use crate::oci::Oci;

/// The container's id.
const ID: &str = "c";

fn limit() -> Context {
    with_duration(seconds(30.0))
}

/// Runs the shim in a bundle.
fn shim(host: &Host, bundle: &Path, words: &[&str], stdin: Vec<u8>) -> Finished {
    let mut all = vec![
        "env".to_owned(),
        format!("--chdir={}", bundle.display()),
        host.prefix()
            .join("bin/containerd-shim-caisson-v2")
            .display()
            .to_string(),
    ];
    all.extend(words.iter().map(|word| (*word).to_owned()));
    Command::new(all).stdin(stdin).run()
}

const FLAGS: [&str; 4] = ["-namespace", "tests", "-id", ID];

fn verb(host: &Host, bundle: &Path, verb: &str) -> Finished {
    shim(host, bundle, &[&FLAGS[..], &[verb]].concat(), Vec::new())
}

fn client(address: &str) -> TaskClient {
    TaskClient::new(Client::connect(address).unwrap())
}

fn creation(bundle: &Path) -> CreateTaskRequest {
    CreateTaskRequest {
        id: ID.to_owned(),
        bundle: bundle.display().to_string(),
        ..Default::default()
    }
}

/// A bundle that holds nothing but what `config` says, if it says something.
fn bundle_of(host: &Host, config: Option<&str>) -> PathBuf {
    let path = host.scratch().join("broken");
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(path.join("rootfs")).unwrap();
    if let Some(config) = config {
        fs::write(path.join("config.json"), config).unwrap();
    }
    path
}

#[test]
fn started_by_parameters_on_standard_input() {
    let host = Host::claim();
    let bundle = Oci::new(&host).bundle("exit 3", |_| {});
    let sockets = host.scratch().join("sockets");
    fs::create_dir(&sockets).unwrap();
    let parameters = BootstrapParams {
        instance_id: ID.to_owned(),
        namespace: "tests".to_owned(),
        containerd_version: "2.3.0".to_owned(),
        socket_dir: Some(sockets.display().to_string()),
        ..Default::default()
    };
    let parameters = parameters.write_to_bytes().unwrap();
    let answer = shim(&host, &bundle, &["start"], parameters).ok();
    let answer = BootstrapResult::parse_from_bytes(answer.stdout_bytes()).unwrap();
    assert_eq!((answer.version, answer.protocol.as_str()), (2, "ttrpc"));
    assert!(
        answer
            .address
            .starts_with(&format!("unix://{}/", sockets.display())),
        "{}",
        answer.address
    );

    let task = client(&answer.address);
    task.create(limit(), &creation(&bundle)).unwrap();
    let start = StartRequest {
        id: ID.to_owned(),
        ..Default::default()
    };
    task.start(limit(), &start).unwrap();
    let wait = WaitRequest {
        id: ID.to_owned(),
        ..Default::default()
    };
    assert_eq!(task.wait(limit(), &wait).unwrap().exit_status, 3);
    // Killed with all that it has, its socket included; then somebody cleans up.
    let pid = fs::read_to_string(bundle.join("shim.pid")).unwrap();
    crate::containerd::daemon::kill(pid.parse().unwrap());
    verb(&host, &bundle, "delete").ok();
    assert_eq!(fs::read_dir(&sockets).unwrap().count(), 0);
}

/// The caller has no answer then, and calls nobody to clean up.
#[test]
fn a_start_that_is_killed_leaves_no_server() {
    const SHIM: &str = "containerd-shim-caisson-v2";
    let host = Host::claim();
    let bundle = Oci::new(&host).bundle("true", |_| {});
    // A pipe without room: it has started the server when it waits there with its answer.
    let (_reader, writer) = rustix::pipe::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while rustix::io::write(&writer, &[0; 4096]).is_ok() {}
    while rustix::io::write(&writer, &[0]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    let mut start = std::process::Command::new(host.prefix().join("bin").join(SHIM))
        .args(FLAGS)
        .arg("start")
        .current_dir(&bundle)
        .stdin(std::process::Stdio::null())
        .stdout(writer)
        .spawn()
        .unwrap();
    let address = bundle.join("address");
    let started = until(seconds(10.0), || address.exists().then_some(()));
    assert!(started.is_some(), "{:?}", start.try_wait());
    let pid = fs::read_to_string(bundle.join("shim.pid")).unwrap();
    assert!(host.processes_of(SHIM).contains(&pid.parse().unwrap()));
    start.kill().unwrap();
    start.wait().unwrap();
    let ended = until(seconds(10.0), || {
        host.processes_of(SHIM).is_empty().then_some(())
    });
    assert!(ended.is_some(), "the server lives on");
    assert!(!Path::new("/run/caisson/shim").exists());
}

#[test]
fn options_of_old_are_no_parameters() {
    let host = Host::claim();
    let bundle = Oci::new(&host).bundle("true", |_| {});
    // `Any` of a runtime's options, as containerd before 2.3 sends it.
    let mut options = containerd_shim_protos::protobuf::well_known_types::any::Any::new();
    options.type_url = "containerd.runc.v1.Options".to_owned();
    let words = [&FLAGS[..], &["start"]].concat();
    let answer = shim(&host, &bundle, &words, options.write_to_bytes().unwrap()).ok();
    assert!(answer.stdout().starts_with("unix:///run/caisson/shim/"));
    verb(&host, &bundle, "delete").ok();
}

#[test]
fn broken_bundles_and_wrong_ids_are_told() {
    let host = Host::claim();
    // Without a namespace nothing is done.
    let bundle = bundle_of(&host, Some("{"));
    shim(&host, &bundle, &["start"], Vec::new()).expect_error(&["-namespace is missing"]);
    // Found by `start`, which must read it.
    verb(&host, &bundle, "start").expect_error(&["config.json", "no OCI specification"]);
    let bundle = bundle_of(&host, Some(r#"{"ociVersion":3}"#));
    verb(&host, &bundle, "start").expect_error(&["config.json", "no OCI specification"]);

    // Found by `Create`.
    for (config, words) in [
        (None, "config.json"),
        (Some(r#"{"ociVersion":"1.2.0"}"#), "network"),
        (
            Some(
                r#"{"ociVersion":"1.2.0","root":{"path":"nowhere"},
                    "linux":{"namespaces":[{"type":"network"},{"type":"pid"}]},
                    "process":{"cwd":"/","args":["x"],"user":{"uid":0,"gid":0}}}"#,
            ),
            "nowhere",
        ),
        (
            Some(
                r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"},
                    "linux":{"namespaces":[{"type":"network"},{"type":"pid","path":"/proc/1/ns/pid"}]},
                    "process":{"cwd":"/","args":["x"],"user":{"uid":0,"gid":0}}}"#,
            ),
            "/proc/1/ns/pid",
        ),
    ] {
        let bundle = bundle_of(&host, config);
        let address = verb(&host, &bundle, "start").ok().stdout();
        let task = client(&address);
        let error = task.create(limit(), &creation(&bundle)).unwrap_err();
        assert!(error.to_string().contains(words), "{words}: {error}");
        let state = StateRequest {
            id: ID.to_owned(),
            ..Default::default()
        };
        let error = task.state(limit(), &state).unwrap_err();
        assert!(error.to_string().contains("no such task: c"), "{error}");
        let delete = DeleteRequest {
            id: "never".to_owned(),
            ..Default::default()
        };
        let error = task.delete(limit(), &delete).unwrap_err();
        assert!(error.to_string().contains("never"), "{error}");
        let shutdown = ShutdownRequest {
            id: ID.to_owned(),
            ..Default::default()
        };
        task.shutdown(limit(), &shutdown).unwrap();
        verb(&host, &bundle, "delete").ok();
    }
}

#[test]
fn hooks_run_where_they_belong_and_may_fail() {
    let host = Host::claim();
    let note = host.scratch().join("note");
    let hook = |script: &str| json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]);
    let run = |hooks: Value, script: &str| {
        let oci = Oci::new(&host);
        let _ = fs::remove_dir_all(host.scratch().join("bundle"));
        let bundle = oci.bundle(script, |config| config["hooks"] = hooks);
        let address = verb(&host, &bundle, "start").ok().stdout();
        let task = client(&address);
        let result = task.create(limit(), &creation(&bundle)).and_then(|_| {
            let start = StartRequest {
                id: ID.to_owned(),
                ..Default::default()
            };
            task.start(limit(), &start)?;
            let wait = WaitRequest {
                id: ID.to_owned(),
                ..Default::default()
            };
            let exit = task.wait(limit(), &wait)?.exit_status;
            task.delete(
                limit(),
                &DeleteRequest {
                    id: ID.to_owned(),
                    ..Default::default()
                },
            )?;
            Ok(exit)
        });
        verb(&host, &bundle, "delete").ok();
        result
    };
    let write = |text: &str| format!("echo {text} >>{}", note.display());
    // On the host: each in its turn. In the guest: before the program, in its own root.
    let hooks = json!({
        "prestart": hook(&write("prestart")),
        "createRuntime": hook(&write("createRuntime")),
        "startContainer": hook("echo here >/from-hook"),
        "poststart": hook(&write("poststart")),
        "poststop": hook(&write("poststop")),
    });
    let exit = run(hooks, "test \"$(cat /from-hook)\" = here && exit 5");
    assert_eq!(exit.unwrap(), 5);
    assert_eq!(
        fs::read_to_string(&note).unwrap(),
        "prestart\ncreateRuntime\npoststart\npoststop\n"
    );
    // One that fails stops the container, and its words are told.
    for name in ["createRuntime", "startContainer"] {
        let hooks = json!({ name: hook("echo not today >&2; exit 9") });
        let error = run(hooks, "true").unwrap_err().to_string();
        assert!(error.contains("not today"), "{name}: {error}");
    }
}
