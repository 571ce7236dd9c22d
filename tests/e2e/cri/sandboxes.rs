//! Pods by containerd's sandbox API (`sandboxer = "shim"`): no container holds them.

use caisson_tests::{Host, seconds, until};
use k8s_cri::v1::NamespaceMode;
use rustix::process::Signal;

use super::{
    client::{Cri, container},
    pods,
};
use crate::containerd::{
    config::SANDBOX_API,
    daemon::{Version, kill},
    with_containerd,
};

with_containerd!(two: [a_pods_life, shared_processes, endings, returns_and_deaths]);

fn cri(host: &Host, version: Version) -> Cri<'_> {
    Cri::with_handler(host, version, SANDBOX_API)
}

fn a_pods_life(version: Version) {
    let host = Host::claim();
    pods::life(&host, &cri(&host, version));
}

fn shared_processes(version: Version) {
    let host = Host::claim();
    pods::shared_processes_in(&cri(&host, version));
}

fn endings(version: Version) {
    let host = Host::claim();
    let cri = cri(&host, version);
    pods::endings_in(&host, &cri);
    // containerd 2.1 itself dies of `hostNetwork` with this API.
    pods::refused_on_host(&cri, |options| {
        options.pid = NamespaceMode::Node.into();
        "PID"
    });
}

fn returns_and_deaths(version: Version) {
    let host = Host::claim();
    let mut cri = cri(&host, version);
    let config = cri.pod("returns");
    let pod = cri.run_pod(&config);
    assert!(cri.is_ready(&pod), "without any container");
    let app = cri.run(&pod, &config, container("app", "exec sleep 1000"));
    let tasks = cri.daemon.ctr(["-n", "k8s.io", "task", "ls", "-q"]);
    assert_eq!(tasks.ok().stdout(), format!("{app}\n"));

    // containerd comes back and finds it.
    cri.restart(Signal::KILL);
    assert!(cri.is_ready(&pod));
    assert_eq!(cri.output(&app, "echo still here"), "still here\n");
    cri.stop(&app, 0);
    cri.remove(&app);
    assert!(cri.is_ready(&pod), "its last container has gone");
    let app = cri.run(&pod, &config, container("again", "exec sleep 1000"));
    cri.output(&app, "true");

    // Its machine dies, or its shim: it is not ready any more, and can be removed.
    // Who asks a killed shim for a task's end hears nothing, for which CRI says 255.
    for (program, codes) in [
        ("caisson-vmm", [137, 137]),
        ("containerd-shim-caisson-v2", [137, 255]),
    ] {
        let config = cri.pod(program);
        let other = cri.run_pod(&config);
        let app = cri.run(&other, &config, container("app", "exec sleep 1000"));
        let processes = host.processes_of(program);
        kill(*processes.iter().max().unwrap());
        let code = cri.ended(&app).exit_code;
        assert!(codes.contains(&code), "{program}: {code}");
        let known = until(seconds(10.0), || (!cri.is_ready(&other)).then_some(()));
        assert!(known.is_some(), "{program}");
        assert!(cri.is_ready(&pod), "the other one lives");
        cri.remove_pod(&other);
    }
    cri.remove_pod(&pod);
}
