//! `caisson-node`: Caisson comes to a node beside runc, and goes again.

use std::{
    fs,
    path::{Path, PathBuf},
};

use caisson_tests::{Command, Finished, Host};

/// containerd 1.7 and 2.x of the testbed.
const DAEMONS: [&str; 2] = ["/usr/bin/containerd", "/opt/containerd-2/bin/containerd"];

fn node(host: &Host, root: &Path, words: &[&str]) -> Finished {
    let program = host.prefix().join("share/caisson/deploy/caisson-node");
    let mut all = vec![program.display().to_string()];
    all.extend(words.iter().map(|word| (*word).to_owned()));
    all.extend(["--root".to_owned(), root.display().to_string()]);
    Command::new(all).run()
}

fn root_with(host: &Host, name: &str, config: Option<&str>) -> (PathBuf, PathBuf) {
    let root = host.scratch().join(name);
    let file = root.join("etc/containerd/config.toml");
    fs::create_dir_all(root.join("etc/containerd")).unwrap();
    if let Some(text) = config {
        fs::write(&file, text).unwrap();
    }
    (root, file)
}

#[test]
fn containerd_gets_one_more_runtime_and_keeps_its_settings() {
    let host = Host::claim();
    for daemon in DAEMONS {
        let default = Command::new([daemon, "config", "default"])
            .run()
            .ok()
            .stdout();
        let changed = default.replace("16384", "7777");
        assert_ne!(default, changed);
        let name = format!("root-{}", daemon.len());
        let (root, file) = root_with(&host, &name, Some(&changed));
        node(&host, &root, &["install"]).ok();
        let file_name = file.display().to_string();
        let dump = Command::new([daemon, "--config", &file_name, "config", "dump"])
            .run()
            .ok()
            .stdout();
        for text in [
            "runtimes.caisson]",
            "/opt/caisson/bin/containerd-shim-caisson-v2",
            "runtimes.runc]",
            "7777",
        ] {
            assert!(dump.contains(text), "{daemon}: no {text}\n{dump}");
        }
        let program = root.join("opt/caisson/libexec/caisson/caisson-vmm");
        assert_eq!(
            fs::read(&program).unwrap(),
            fs::read(host.prefix().join("libexec/caisson/caisson-vmm")).unwrap()
        );
        let link = fs::read_link(root.join("usr/local/bin/caisson")).unwrap();
        assert_eq!(link, Path::new("/opt/caisson/bin/caisson"));
        // A second time changes nothing, and so restarts nothing.
        let before = fs::read(&file).unwrap();
        let again = node(&host, &root, &["install"]).ok();
        assert!(!again.stdout().contains("restart"), "{again}");
        assert_eq!(fs::read(&file).unwrap(), before);
        let sandbox = root.join("run/caisson/sandboxes/k8s.io.x");
        fs::create_dir_all(&sandbox).unwrap();
        node(&host, &root, &["uninstall"]).expect_error(&["1 microVMs run", "--force"]);
        assert!(program.exists());
        fs::remove_dir(&sandbox).unwrap();
        node(&host, &root, &["uninstall"]).ok();
        assert_eq!(fs::read_to_string(&file).unwrap(), changed);
        assert!(!root.join("opt/caisson").exists());
        assert!(fs::symlink_metadata(root.join("usr/local/bin/caisson")).is_err());
    }
}

#[test]
fn nodes_of_other_kinds() {
    let host = Host::claim();
    let (root, file) = root_with(&host, "none", None);
    fs::create_dir_all(root.join("etc/crio")).unwrap();
    node(&host, &root, &["install", "--prefix", "/usr/caisson"])
        .ok()
        .expect_in_stdout("restart containerd");
    for daemon in DAEMONS {
        let dump = Command::new([
            daemon,
            "--config",
            &file.display().to_string(),
            "config",
            "dump",
        ]);
        dump.run()
            .ok()
            .expect_in_stdout("/usr/caisson/bin/containerd-shim-caisson-v2");
    }
    let drop_in = root.join("etc/crio/crio.conf.d/50-caisson.conf");
    let text = fs::read_to_string(&drop_in).unwrap();
    assert!(
        text.contains("/usr/caisson/bin/containerd-shim-caisson-v2"),
        "{text}"
    );
    node(&host, &root, &["uninstall", "--prefix", "/usr/caisson"]).ok();
    assert!(!drop_in.exists());
    let (root, file) = root_with(&host, "old", Some("root = \"/var/lib/containerd\"\n"));
    node(&host, &root, &["install"]).expect_error(&["version 1", "config migrate"]);
    assert_eq!(
        fs::read_to_string(&file).unwrap(),
        "root = \"/var/lib/containerd\"\n"
    );
    node(&host, &host.scratch().join("nowhere"), &["install"]).expect_error(&["no root of a node"]);
    node(&host, &root, &["install", "--from", "/nowhere"]).expect_error(&["/nowhere/bin/caisson"]);
    assert_eq!(node(&host, &root, &["instal"]).code(), 2);
}
