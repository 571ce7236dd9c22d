//! Pods and their containers.

use std::{collections::HashMap, fs};

use caisson_tests::{Host, seconds, until};
use k8s_cri::v1::{
    Capability, ContainerStatsRequest, DnsConfig, Int64Value, LinuxContainerResources,
    LinuxContainerSecurityContext, Mount, NamespaceMode, NamespaceOption, PodSandboxStatsRequest,
    PodSandboxStatusRequest, ReopenContainerLogRequest, SecurityProfile,
    UpdateContainerResourcesRequest, security_profile::ProfileType,
};

use super::client::{Cri, container};
use crate::containerd::{daemon::Version, with_containerd};

with_containerd!(
    one: [a_pods_life, endings, resources_and_their_use, security_contexts, shared_processes],
    two: [a_pods_life, endings, resources_and_their_use, security_contexts, shared_processes]
);

fn a_pods_life(version: Version) {
    let host = Host::claim();
    life(&host, &Cri::start(&host, version));
}

pub fn life(host: &Host, cri: &Cri<'_>) {
    let mut config = cri.pod("life");
    config.dns_config = Some(DnsConfig {
        servers: vec!["10.0.0.53".to_owned()],
        searches: vec!["svc.example".to_owned()],
        options: vec!["ndots:5".to_owned()],
    });
    config.linux.as_mut().unwrap().sysctls =
        HashMap::from([("kernel.shm_rmid_forced".to_owned(), "1".to_owned())]);
    let pod = cri.run_pod(&config);
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.clone(),
        verbose: false,
    };
    let status = cri
        .call(async |mut client| client.pod_sandbox_status(request).await)
        .unwrap()
        .status
        .unwrap();
    assert!(
        status
            .network
            .is_some_and(|network| network.ip.starts_with("10.77.0.")),
        "the pod has an address"
    );

    // An init container, with a volume that it fills for the others.
    let volume = host.scratch().join("volume");
    fs::create_dir(&volume).unwrap();
    let hosts = host.scratch().join("hosts");
    fs::write(&hosts, "127.0.0.1 localhost\n10.1.2.3 an.alias\n").unwrap();
    let message = host.scratch().join("message");
    fs::write(&message, "").unwrap();
    let mount = |source: &std::path::Path, target: &str| Mount {
        host_path: source.display().to_string(),
        container_path: target.to_owned(),
        ..Default::default()
    };
    let mut init = container("init", "echo from init; echo filled >/volume/file");
    init.mounts = vec![mount(&volume, "/volume")];
    let init = cri.run(&pod, &config, init);
    assert_eq!(cri.ended(&init).exit_code, 0);
    assert_eq!(cri.log(&config, "init"), ["stdout F from init"]);

    // Two at a time, in one machine, which the init container's end has not ended.
    let mut app = container("app", "echo out; echo err >&2; exec sleep 1000");
    app.mounts = vec![
        mount(&volume, "/volume"),
        mount(&hosts, "/etc/hosts"),
        mount(&message, "/dev/termination-log"),
    ];
    let app = cri.run(&pod, &config, app);
    let side = cri.run(&pod, &config, container("side", "exec sleep 1000"));
    assert_eq!(host.processes_of("containerd-shim-caisson-v2").len(), 1);
    assert_eq!(host.processes_of("caisson-vmm").len(), 1);
    assert_eq!(
        cri.output(&app, "cat /volume/file; hostname"),
        "filled\nlife\n"
    );
    assert_eq!(
        cri.output(&side, "cat /etc/resolv.conf; hostname"),
        "search svc.example\nnameserver 10.0.0.53\noptions ndots:5\nlife\n"
    );
    assert!(
        cri.output(&app, "cat /etc/hosts")
            .contains("10.1.2.3 an.alias")
    );
    assert_eq!(
        cri.output(&app, "cat /proc/sys/kernel/shm_rmid_forced"),
        "1\n"
    );
    // Processes of one are not seen by the other; shared memory is.
    assert!(!cri.output(&side, "ps").contains("sleep 1000\n   7"));
    assert_eq!(cri.output(&app, "echo shared >/dev/shm/x"), "");
    assert_eq!(cri.output(&side, "cat /dev/shm/x"), "shared\n");

    // Exec, as probes do it.
    let answer = cri.exec(&app, "echo o; echo e >&2; exit 3", 0).unwrap();
    assert_eq!(
        (answer.exit_code, &answer.stdout[..], &answer.stderr[..]),
        (3, &b"o\n"[..], &b"e\n"[..])
    );
    let late = cri.exec(&app, "sleep 1000", 1).unwrap_err();
    assert_eq!(late.code(), tonic::Code::DeadlineExceeded, "{late}");
    assert!(
        !cri.output(&app, "ps").contains("sleep 1000\n  1"),
        "the late one is gone"
    );

    // Logs, and a new file after the old was moved away.
    let mut lines = cri.log(&config, "app");
    lines.sort_unstable();
    assert_eq!(lines, ["stderr F err", "stdout F out"]);
    let log = format!("{}/app.log", config.log_directory);
    fs::rename(&log, format!("{log}.1")).unwrap();
    let request = ReopenContainerLogRequest {
        container_id: app.clone(),
    };
    cri.call(async |mut client| client.reopen_container_log(request).await)
        .unwrap();
    cri.output(&app, "echo again >/proc/1/fd/1");
    let written = until(seconds(10.0), || {
        (cri.log(&config, "app") == ["stdout F again"]).then_some(())
    });
    assert!(written.is_some(), "{:?}", cri.log(&config, "app"));

    // A termination message; a restart after all others have gone.
    cri.output(&app, "echo why >/dev/termination-log");
    assert_eq!(fs::read_to_string(&message).unwrap(), "why\n");
    for id in [&app, &side] {
        cri.stop(id, 0);
        assert_eq!(cri.ended(id).exit_code, 137);
        cri.remove(id);
    }
    let mut again = container("app", "cat /volume/file; exec sleep 1000");
    again.metadata.as_mut().unwrap().attempt = 1;
    again.mounts = vec![mount(&volume, "/volume")];
    let again = cri.run(&pod, &config, again);
    assert_eq!(cri.output(&again, "cat /volume/file"), "filled\n");
    // A pod goes with what still runs in it.
    cri.remove_pod(&pod);
}

fn resources_and_their_use(version: Version) {
    let host = Host::claim();
    let cri = Cri::start(&host, version);
    let mut config = cri.pod("figures");
    // A kubelet makes a cgroup for every pod, whose figures are the pod's.
    let cgroup = std::path::Path::new("/sys/fs/cgroup/pod-figures");
    fs::create_dir(cgroup).unwrap();
    config.linux.as_mut().unwrap().cgroup_parent = "/pod-figures".to_owned();
    let pod = cri.run_pod(&config);
    let limits = |memory: i64, shares: i64| LinuxContainerResources {
        memory_limit_in_bytes: memory,
        cpu_shares: shares,
        cpu_period: 100_000,
        cpu_quota: 50_000,
        ..Default::default()
    };
    let mut app = container("app", "exec sleep 1000");
    app.linux.as_mut().unwrap().resources = Some(limits(64 << 20, 512));
    let app = cri.run(&pod, &config, app);
    let read = |name: &str| cri.output(&app, &format!("cat /sys/fs/cgroup/{name}"));
    assert_eq!(read("memory.max"), format!("{}\n", 64 << 20));
    assert_eq!(read("cpu.max"), "50000 100000\n");

    let request = ContainerStatsRequest {
        container_id: app.clone(),
    };
    let stats = cri
        .call(async |mut client| client.container_stats(request).await)
        .unwrap()
        .stats
        .unwrap();
    let memory = stats.memory.unwrap().working_set_bytes.unwrap().value;
    assert!((4096..64 << 20).contains(&memory), "{memory}");
    assert!(stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);
    let request = PodSandboxStatsRequest {
        pod_sandbox_id: pod.clone(),
    };
    let stats = cri
        .call(async |mut client| client.pod_sandbox_stats(request).await)
        .unwrap()
        .stats
        .unwrap()
        .linux
        .unwrap();
    assert_eq!(stats.containers.len(), 1);
    // The machine's memory is more than that of what runs in it.
    let whole = stats.memory.unwrap().usage_bytes.unwrap().value;
    assert!(whole > memory, "{whole} {memory}");
    assert!(stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);

    let request = UpdateContainerResourcesRequest {
        container_id: app.clone(),
        linux: Some(limits(96 << 20, 1024)),
        ..Default::default()
    };
    cri.call(async |mut client| client.update_container_resources(request).await)
        .unwrap();
    assert_eq!(read("memory.max"), format!("{}\n", 96 << 20));

    // More than it may have.
    let mut greedy = container("greedy", "head -c 64m /dev/zero | tail -c 64m | wc -c");
    greedy.command = ["sh", "-c", "exec tail /dev/zero"]
        .map(str::to_owned)
        .to_vec();
    greedy.linux.as_mut().unwrap().resources = Some(limits(16 << 20, 512));
    let greedy = cri.run(&pod, &config, greedy);
    let status = cri.ended(&greedy);
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (137, "OOMKilled")
    );
    cri.remove_pod(&pod);
    fs::remove_dir(cgroup).unwrap();
}

fn security_contexts(version: Version) {
    let host = Host::claim();
    let cri = Cri::start(&host, version);
    let config = cri.pod("secure");
    let pod = cri.run_pod(&config);
    let with = |name: &str, change: &dyn Fn(&mut LinuxContainerSecurityContext)| {
        let mut config_of = container(name, "exec sleep 1000");
        let linux = config_of.linux.as_mut().unwrap();
        change(linux.security_context.as_mut().unwrap());
        cri.run(&pod, &config, config_of)
    };
    let user = with("user", &|context| {
        context.run_as_user = Some(Int64Value { value: 1234 });
        context.run_as_group = Some(Int64Value { value: 2345 });
        context.supplemental_groups = vec![3456];
        context.readonly_rootfs = true;
        context.no_new_privs = true;
        context.seccomp = Some(SecurityProfile::default());
        context.capabilities = Some(Capability {
            drop_capabilities: vec!["ALL".to_owned()],
            ..Default::default()
        });
    });
    assert_eq!(
        cri.output(&user, "id -u; id -g; id -G"),
        "1234\n2345\n2345 3456\n"
    );
    let denied = cri.exec(&user, ">/tmp/x", 0).unwrap();
    assert_ne!(denied.exit_code, 0, "its root is read-only");
    let status = cri.output(
        &user,
        "grep -E '^(NoNewPrivs|Seccomp|CapBnd):' /proc/1/status",
    );
    let figures: Vec<&str> = status.split_whitespace().skip(1).step_by(2).collect();
    assert_eq!(figures, ["0000000000000000", "1", "2"], "{status}");

    let profile = host.scratch().join("profile.json");
    let rules = r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64"],
        "syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":1}]}"#;
    fs::write(&profile, rules).unwrap();
    let capable = with("capable", &|context| {
        context.seccomp = Some(SecurityProfile {
            profile_type: ProfileType::Localhost.into(),
            localhost_ref: profile.display().to_string(),
        });
        context.capabilities = Some(Capability {
            add_capabilities: vec!["NET_ADMIN".to_owned()],
            ..Default::default()
        });
    });
    cri.output(
        &capable,
        "ip link set lo mtu 1400 && touch /tmp/may && test ! -e /tmp/not",
    );
    let filtered = cri.exec(&capable, "mkdir /tmp/not", 0).unwrap();
    let told = String::from_utf8_lossy(&filtered.stderr);
    assert!(told.contains("Operation not permitted"), "{told}");
    let plain = with("plain", &|_| {});
    assert_ne!(
        cri.exec(&plain, "ip link set lo mtu 1300", 0)
            .unwrap()
            .exit_code,
        0
    );

    // All the guest has, and nothing of the host.
    let config_of_privileged = {
        let mut config = cri.pod("privileged");
        let linux = config.linux.as_mut().unwrap();
        linux.security_context.as_mut().unwrap().privileged = true;
        config
    };
    let other = cri.run_pod(&config_of_privileged);
    let mut all = container("all", "exec sleep 1000");
    let linux = all.linux.as_mut().unwrap();
    linux.security_context.as_mut().unwrap().privileged = true;
    let all = cri.run(&other, &config_of_privileged, all);
    cri.output(&all, "mkdir /m && mount -t tmpfs x /m");
    let host_kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(cri.output(&all, "uname -r"), host_kernel);
    cri.remove_pod(&other);
    cri.remove_pod(&pod);
}

/// `shareProcessNamespace`.
fn shared_processes(version: Version) {
    let host = Host::claim();
    shared_processes_in(&Cri::start(&host, version));
}

pub fn shared_processes_in(cri: &Cri<'_>) {
    let shared = NamespaceOption {
        pid: NamespaceMode::Pod.into(),
        ..Default::default()
    };
    let mut config = cri.pod("shared");
    let linux = config.linux.as_mut().unwrap();
    linux.security_context.as_mut().unwrap().namespace_options = Some(shared.clone());
    let pod = cri.run_pod(&config);
    let with = |name: &str, script: &str| {
        let mut one = container(name, script);
        let linux = one.linux.as_mut().unwrap();
        linux.security_context.as_mut().unwrap().namespace_options = Some(shared.clone());
        cri.run(&pod, &config, one)
    };
    let first = with("first", "sleep 5555 & exec sleep 4321");
    let second = with("second", "exec sleep 8765");
    for id in [&first, &second] {
        let seen = cri.output(id, "ps");
        assert!(
            seen.contains("sleep 4321") && seen.contains("sleep 8765"),
            "{seen}"
        );
        // PID 1 is none of theirs, and no way into the guest.
        cri.output(id, "test ! -e /proc/1/root/run/caisson");
    }
    // One container's end is not the other's.
    cri.stop(&first, 0);
    assert_eq!(cri.ended(&first).exit_code, 137);
    // All of it has gone, although the namespace has not.
    let seen = cri.output(&second, "ps");
    assert!(!seen.contains("sleep 5555"), "{seen}");
    cri.remove(&first);
    let third = with("third", "exec sleep 1234");
    for id in [&second, &third] {
        let seen = cri.output(id, "ps");
        assert!(
            seen.contains("sleep 1234") && seen.contains("sleep 8765"),
            "{seen}"
        );
    }
    cri.remove_pod(&pod);
}

fn endings(version: Version) {
    let host = Host::claim();
    let cri = Cri::start(&host, version);
    endings_in(&host, &cri);
    // The host's network is not for a guest (`hostNetwork`).
    refused_on_host(&cri, |options| {
        options.network = NamespaceMode::Node.into();
        "network"
    });
    refused_on_host(&cri, |options| {
        options.pid = NamespaceMode::Node.into();
        "PID"
    });
}

/// A pod that wants one of the host's namespaces: `ask` gives the name that the error has.
pub fn refused_on_host(cri: &Cri<'_>, ask: impl Fn(&mut NamespaceOption) -> &'static str) {
    let mut config = cri.pod("host");
    let context = &mut config.linux.as_mut().unwrap().security_context;
    let options = context.as_mut().unwrap().namespace_options.as_mut();
    let name = ask(options.unwrap());
    let refused = cri.try_run_pod(&config).unwrap_err();
    assert!(refused.message().contains(name), "{refused}");
}

pub fn endings_in(host: &Host, cri: &Cri<'_>) {
    let config = cri.pod("endings");
    let pod = cri.run_pod(&config);
    let failed = cri.run(&pod, &config, container("failed", "exit 9"));
    let status = cri.ended(&failed);
    assert_eq!((status.exit_code, status.reason.as_str()), (9, "Error"));
    assert!(status.finished_at >= status.started_at && status.started_at > 0);
    // Asked to end, it takes its time, but less than it is given.
    let polite = cri.run(
        &pod,
        &config,
        container(
            "polite",
            "trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.1; done",
        ),
    );
    let ready = until(seconds(20.0), || {
        (!cri.log(&config, "polite").is_empty()).then_some(())
    });
    assert!(ready.is_some());
    cri.stop(&polite, 120);
    assert_eq!(cri.ended(&polite).exit_code, 7);
    assert_eq!(
        cri.log(&config, "polite"),
        ["stdout F ready", "stdout F bye"]
    );
    // A program that is not there.
    let mut missing = container("missing", "");
    missing.command = vec!["/not/there".to_owned()];
    let missing = cri.create(&pod, &config, missing).unwrap();
    let error = cri.start_container(&missing).unwrap_err();
    assert!(error.message().contains("/not/there"), "{error}");
    let status = cri.ended(&missing);
    assert_ne!(status.exit_code, 0);
    // Its machine dies: told for every container, and the pod can be removed.
    let last = cri.run(&pod, &config, container("last", "exec sleep 1000"));
    crate::containerd::daemon::kill(host.processes_of("caisson-vmm")[0]);
    assert_eq!(cri.ended(&last).exit_code, 137);
    cri.remove_pod(&pod);
}
