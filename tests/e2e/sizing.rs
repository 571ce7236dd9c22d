//! A microVM's size follows its containers while it runs: through the shim's Task API, as containerd
//! updates a container and adds others to a pod.

use std::{fs, path::PathBuf, time::Duration};

use caisson_tests::{Host, seconds, until};
use containerd_shim_protos::{
    Client, TaskClient,
    api::{
        CreateTaskRequest, DeleteRequest, KillRequest, Mount, StartRequest, UpdateTaskRequest,
        WaitRequest,
    },
    protobuf::{MessageField, well_known_types::any::Any},
    ttrpc::context::{Context, with_duration},
};
use serde_json::{Value, json};

use crate::configuration::with_files;

const MIB: u64 = 1 << 20;
const CONFIG: &str =
    "growth_max_vcpus = 3\ngrowth_max_memory_mib = 1024\nhost_overhead_mib = 100\n";

fn limit() -> Context {
    with_duration(seconds(30.0))
}

/// A container of 1 vCPU and 64 MiB that can grow, and its shim.
struct Pod<'a> {
    host: &'a Host,
    id: String,
    shim: TaskClient,
}

fn bundle_of(id: &str) -> PathBuf {
    format!("/var/lib/caisson/containers/{id}/bundle").into()
}

impl<'a> Pod<'a> {
    fn start(host: &'a Host) -> Self {
        let words = format!(
            "run -d --name grows -m 64m --cpus 0.5 {} sleep 10000",
            host.busybox()
        );
        let finished = with_files(host, &[("config.toml", CONFIG)], &words).ok();
        let id = finished.line();
        let address = fs::read_to_string(bundle_of(&id).join("address")).unwrap();
        Self {
            host,
            id,
            shim: TaskClient::new(Client::connect(&address).unwrap()),
        }
    }

    fn bundle(&self) -> PathBuf {
        bundle_of(&self.id)
    }

    fn update(&self, resources: &Value) -> Result<(), String> {
        let request = UpdateTaskRequest {
            id: self.id.clone(),
            resources: MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
                value: serde_json::to_vec(resources).unwrap(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let updated = self.shim.update(limit(), &request);
        updated.map(drop).map_err(|error| error.to_string())
    }

    /// Adds a container to the pod, from the image of the first one, with other limits.
    fn add(&self, id: &str, resources: &Value) {
        let text = fs::read(self.bundle().join("config.json")).unwrap();
        let mut spec: Value = serde_json::from_slice(&text).unwrap();
        spec["linux"]["resources"] = resources.clone();
        let bundle = self.host.scratch().join(id);
        fs::create_dir_all(&bundle).unwrap();
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let request = CreateTaskRequest {
            id: id.into(),
            bundle: bundle.display().to_string(),
            rootfs: vec![Mount {
                type_: "erofs".into(),
                source: self.layer().display().to_string(),
                options: vec!["ro".into()],
                ..Default::default()
            }],
            ..Default::default()
        };
        self.shim.create(limit(), &request).unwrap();
        let request = StartRequest {
            id: id.into(),
            ..Default::default()
        };
        self.shim.start(limit(), &request).unwrap();
    }

    fn remove(&self, id: &str) {
        let id = id.to_owned();
        let kill = KillRequest {
            id: id.clone(),
            signal: 9,
            ..Default::default()
        };
        self.shim.kill(limit(), &kill).unwrap();
        let wait = WaitRequest {
            id: id.clone(),
            ..Default::default()
        };
        self.shim.wait(limit(), &wait).unwrap();
        let delete = DeleteRequest {
            id,
            ..Default::default()
        };
        self.shim.delete(limit(), &delete).unwrap();
    }

    /// The one layer of the busybox image.
    fn layer(&self) -> PathBuf {
        let record = self.bundle().with_file_name("container.json");
        let record: Value = serde_json::from_slice(&fs::read(record).unwrap()).unwrap();
        record["layers"][0].as_str().expect("a layer").into()
    }

    /// What a command in the first container prints, as numbers.
    fn ask(&self, script: &str) -> Vec<u64> {
        let finished = self
            .host
            .caisson(["exec", "grows", "sh", "-c", script])
            .ok();
        let text = finished.stdout();
        text.split_whitespace()
            .map(|word| word.parse().unwrap())
            .collect()
    }

    /// MiB of the guest's memory.
    fn total(&self) -> u64 {
        self.ask("awk '/MemTotal/ { print $2 }' /proc/meminfo")[0] / 1024
    }

    /// A file of the sandbox's cgroup on the host.
    fn host_limit(&self, file: &str) -> String {
        let sandboxes = fs::read_dir("/sys/fs/cgroup/caisson").unwrap();
        let directory = sandboxes
            .flatten()
            .find(|entry| entry.path().is_dir())
            .expect("a cgroup of the sandbox")
            .path();
        fs::read_to_string(directory.join(file))
            .unwrap()
            .trim()
            .to_owned()
    }

    fn wait_for(&self, what: &str, mut holds: impl FnMut() -> bool) {
        until(seconds(10.0).max(Duration::from_secs(30)), || {
            holds().then_some(())
        })
        .unwrap_or_else(|| {
            panic!(
                "{what}: {} MiB, {}",
                self.total(),
                self.host_limit("memory.max")
            )
        });
    }

    fn end(self) {
        self.host.caisson(["rm", "-f", "grows"]).ok();
    }
}

#[test]
fn an_update_grows_the_microvm_and_gives_back() {
    let host = Host::claim();
    let pod = Pod::start(&host);
    assert!(pod.total() < 112, "{} MiB", pod.total());
    assert_eq!(pod.host_limit("memory.max"), (212 * MIB).to_string());
    assert_eq!(pod.host_limit("cpu.max"), "75000 100000");
    pod.update(&json!({ "cpu": { "quota": 250_000, "period": 100_000 }, "memory": { "limit": 320 * MIB } }))
        .unwrap();
    let seen =
        pod.ask("nproc; cat /sys/fs/cgroup/memory.max; cut -d ' ' -f 1 /sys/fs/cgroup/cpu.max");
    assert_eq!(seen, [3, 320 * MIB, 250_000]);
    let total = pod.total();
    assert!((320..112 + 256).contains(&total), "{total} MiB");
    assert_eq!(pod.host_limit("memory.max"), (468 * MIB).to_string());
    assert_eq!(pod.host_limit("cpu.max"), "275000 100000");
    // Memory that is there is memory that can be used: far more than the microVM had.
    let fill = "x=0123456789abcdef; while [ ${#x} -lt 100000000 ]; do x=$x$x; done; echo ${#x}";
    assert_eq!(pod.ask(fill), [16 << 23]);
    pod.update(&json!({ "memory": { "limit": 64 * MIB }, "cpu": { "quota": 50_000 } }))
        .unwrap();
    pod.wait_for("the memory is not given back", || {
        pod.host_limit("memory.max") == (212 * MIB).to_string()
    });
    assert!(pod.total() < 112, "{} MiB", pod.total());
    assert_eq!(pod.host_limit("cpu.max"), "75000 100000");
    let refused = pod
        .update(&json!({ "memory": { "limit": 2048 * MIB } }))
        .unwrap_err();
    assert!(
        refused.contains("2096 MiB") && refused.contains("1024 MiB"),
        "{refused}"
    );
    assert_eq!(pod.ask("cat /sys/fs/cgroup/memory.max"), [64 * MIB]);
    pod.end();
}

#[test]
fn processors_of_the_host_bind_the_microvm_and_mean_nothing_in_it() {
    let host = Host::claim();
    let pod = Pod::start(&host);
    pod.update(&json!({ "cpu": { "cpus": "0", "mems": "0" } }))
        .unwrap();
    assert_eq!(pod.host_limit("cpuset.cpus"), "0");
    assert_eq!(pod.host_limit("cpuset.mems"), "0");
    assert_eq!(pod.ask("cat /sys/fs/cgroup/cpuset.cpus"), [0; 0]);
    let refused = pod
        .update(&json!({ "cpu": { "cpus": "8000" } }))
        .unwrap_err();
    assert!(refused.contains("processors 8000"), "{refused}");
    assert_eq!(pod.host_limit("cpuset.cpus"), "0");
    pod.end();
}

#[test]
fn a_container_that_comes_grows_the_microvm_and_one_that_goes_gives_back() {
    let host = Host::claim();
    let pod = Pod::start(&host);
    let before = pod.total();
    pod.add(
        "second",
        &json!({ "cpu": { "quota": 100_000, "period": 100_000 }, "memory": { "limit": 200 * MIB } }),
    );
    assert_eq!(pod.ask("nproc"), [2]);
    assert!(pod.total() >= before + 190, "{} MiB", pod.total());
    assert_eq!(pod.host_limit("memory.max"), (412 * MIB).to_string());
    assert_eq!(pod.host_limit("cpu.max"), "175000 100000");
    pod.remove("second");
    pod.wait_for("the memory is not given back", || pod.total() <= before);
    pod.wait_for("the limit on the host stays", || {
        pod.host_limit("memory.max") == (212 * MIB).to_string()
    });
    pod.end();
}
