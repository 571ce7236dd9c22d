//! What an operator sees of all microVMs: `ps --sandboxes`, `metrics`.

use caisson_tests::{Command, Host, seconds, until};
use rustix::process::Signal;

#[test]
fn sandboxes_tell_of_themselves() {
    let host = Host::claim();
    host.caisson(["ps", "--sandboxes"])
        .ok()
        .expect_stdout("SANDBOX   MANAGER   CONTAINERS   VCPUS   MEMORY   VMM   UP\n");
    let id = host
        .caisson([
            "run",
            "-d",
            "--name",
            "one",
            host.busybox(),
            "sleep",
            "1000",
        ])
        .ok()
        .line();
    let listed = host
        .caisson(["ps", "--sandboxes", "--format", "json"])
        .ok()
        .json();
    assert_eq!(listed["Manager"], "caisson", "{listed}");
    assert_eq!(listed["Containers"], serde_json::json!([id]), "{listed}");
    assert_eq!(
        listed["VMMPid"].as_i64().map(|pid| vec![pid as i32]),
        Some(host.processes_of("caisson-vmm")),
        "{listed}"
    );
    let text = host.caisson(["metrics"]).ok().stdout();
    let value = |start: &str| {
        let line = text.lines().find(|line| line.starts_with(start));
        let value = line.and_then(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
        value.unwrap_or_else(|| panic!("no {start}\n{text}"))
    };
    for positive in [
        "caisson_answers",
        "caisson_guest_answers",
        "caisson_vm_exits_total",
        "caisson_memory_size_bytes",
        "caisson_container_memory_bytes",
        "caisson_container_cpu_seconds_total",
        "caisson_process_pss_bytes",
        "caisson_device_requests_total",
        "caisson_agent_request_duration_seconds_count",
    ] {
        assert!(value(positive) > 0.0, "{positive}\n{text}");
    }
    for clock in ["host", "vmm", "guest"] {
        assert!(text.contains(&format!("clock=\"{clock}\"")), "{text}");
    }
    let mut server = host
        .command(["metrics", "--listen", "127.0.0.1:0"])
        .within(60.0)
        .start();
    server.wait_for_stdout("/metrics");
    let url = server.stdout_so_far().trim().replace("serving ", "");
    let fetch = |url: &str| Command::new(["busybox", "wget", "-q", "-O", "-", url]).run();
    let served = fetch(&url).ok().stdout();
    assert!(served.contains("caisson_vm_exits_total{"), "{served}");
    assert_ne!(fetch(&url.replace("/metrics", "/other")).code(), 0);
    server.signal(Signal::TERM);
    server.finish().expect_code(0);
    // One whose shim does not answer is told, not waited for without end.
    let shims = host.processes_of("containerd-shim-caisson-v2");
    let tell = |signal| {
        for pid in &shims {
            let pid = rustix::process::Pid::from_raw(*pid).unwrap();
            rustix::process::kill_process(pid, signal).unwrap();
        }
    };
    tell(Signal::STOP);
    host.caisson(["ps", "--sandboxes"])
        .expect_in_stdout("does not answer");
    tell(Signal::CONT);
    let back = until(seconds(10.0), || {
        let listed = host.caisson(["ps", "--sandboxes"]).ok().stdout();
        (!listed.contains("does not answer")).then_some(())
    });
    assert!(back.is_some());
    host.caisson(["metrics", "--listen", "nowhere"])
        .expect_error(&["nowhere"]);
    host.caisson(["rm", "-f", "one"]).ok();
}
