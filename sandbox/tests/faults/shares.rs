//! Host directories in the guest.

use std::{fs, path::PathBuf, time::Duration};

use caisson_sandbox::{Error, Sandbox};
use libtest_mimic::Trial;

use crate::{host::Host, start::container, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("a_path_is_shared_as_it_is_now", as_it_is_now),
        trial("a_share_that_fails_costs_no_other", failure_is_alone),
        trial("a_file_server_that_fails", no_file_server),
        trial("a_guest_that_does_not_take_the_shares", never_bound),
    ]
}

async fn create(sandbox: &Sandbox, id: &str, source: &PathBuf) -> Result<(), Error> {
    let spec = format!(
        r#"{{"ociVersion":"1.2.0","mounts":[{{"destination":"/data","type":"bind","source":{source:?}}}]}}"#
    );
    sandbox
        .create_container(container(id, &spec))
        .await
        .map(drop)
}

/// The directory in which the file server sees its shares.
fn served(host: &Host, sandbox: &Sandbox) -> PathBuf {
    let mut processes = host.processes();
    processes.retain(|pid| *pid != sandbox.vmm_pid());
    assert_eq!(processes.len(), 1, "one file server");
    format!("/proc/{}/root", processes[0]).into()
}

fn entries(host: &Host) -> Vec<String> {
    let requests = host.requests();
    let entries = requests
        .iter()
        .filter_map(|line| line.strip_prefix("mount share:"));
    entries.map(str::to_owned).collect()
}

async fn as_it_is_now() {
    let host = Host::new("ok");
    let (sandbox, _events) = host.start().await.unwrap();
    let data = host.path("data");
    let replace = |text: &str| {
        if data.exists() {
            fs::rename(&data, host.path(&format!("before-{text}"))).unwrap();
        }
        fs::create_dir(&data).unwrap();
        fs::write(data.join("file"), text).unwrap();
    };
    replace("first");
    create(&sandbox, "a", &data).await.unwrap();
    let root = served(&host, &sandbox);
    let read = |entry: &str| fs::read_to_string(root.join(entry).join("file")).unwrap();
    replace("second");
    create(&sandbox, "b", &data).await.unwrap();
    let names = entries(&host);
    assert_eq!(read(&names[0]), "first");
    assert_eq!(read(&names[1]), "second");
    // What a container used goes with it, and only that.
    sandbox.delete_process("a", "").await.unwrap();
    assert!(!root.join(&names[0]).exists());
    assert_eq!(read(&names[1]), "second");
    create(&sandbox, "c", &data).await.unwrap();
    let names = entries(&host);
    assert!(
        !names[..2].contains(&names[2]),
        "a name was used twice: {names:?}"
    );
    sandbox.stop(Duration::ZERO).await.unwrap();
    host.assert_empty();
}

async fn failure_is_alone() {
    let host = Host::new("ok");
    let (sandbox, _events) = host.start().await.unwrap();
    let data = host.path("data");
    fs::create_dir(&data).unwrap();
    create(&sandbox, "a", &data).await.unwrap();
    let root = served(&host, &sandbox);
    let error = create(&sandbox, "b", &host.path("nowhere"))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::FileServer(_)), "{error:?}");
    assert!(error.to_string().contains("nowhere"), "{error}");
    create(&sandbox, "c", &data).await.unwrap();
    assert_eq!(
        served(&host, &sandbox),
        root,
        "the file server is another one"
    );
    for name in entries(&host) {
        assert!(root.join(&name).is_dir(), "share {name} is gone");
    }
    sandbox.stop(Duration::ZERO).await.unwrap();
    host.assert_empty();
}

async fn no_file_server() {
    for behaviour in ["exits", "silent"] {
        let host = Host::new("ok").file_server(behaviour);
        let (sandbox, _events) = host.start().await.unwrap();
        let error = create(&sandbox, "a", &host.path("")).await.unwrap_err();
        assert!(matches!(error, Error::FileServer(_)), "{error:?}");
        assert_eq!(host.processes(), [sandbox.vmm_pid()]);
        sandbox.stop(Duration::ZERO).await.unwrap();
        host.assert_empty();
    }
}

async fn never_bound() {
    let host = Host::new("never-binds");
    let (sandbox, _events) = host.start().await.unwrap();
    for id in ["a", "b"] {
        let error = create(&sandbox, id, &host.path("")).await.unwrap_err();
        assert!(matches!(error, Error::Agent { .. }), "{error:?}");
        assert_eq!(
            host.processes(),
            [sandbox.vmm_pid()],
            "the file server is left"
        );
    }
    let requests = host.requests();
    let count = |prefix: &str| {
        requests
            .iter()
            .filter(|line| line.starts_with(prefix))
            .count()
    };
    assert_eq!(count("attach fs"), count("detach"), "{requests:?}");
    sandbox.stop(Duration::ZERO).await.unwrap();
    host.assert_empty();
}
