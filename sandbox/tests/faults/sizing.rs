//! The microVM's size follows its containers, and a guest that does not play along costs nothing.

use std::time::{Duration, Instant};

use caisson_sandbox::{AgentErrorKind, Error, Sandbox, SandboxSpec};
use libtest_mimic::Trial;

use crate::{host::Host, start::container, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("a_vm_grows_with_its_containers", grows),
        trial("an_update_grows_and_gives_back", updates),
        trial("an_update_that_is_refused_gives_back", refused),
        trial("a_container_that_cannot_be_made_gives_back", not_made),
        trial("a_guest_that_does_not_plug", never_plugs),
        trial("more_than_the_configuration_allows", too_much),
        trial("a_vm_without_room_is_booted_without", no_room),
        trial("huge_pages_are_kept_beside_the_memory", huge_pages),
        trial("huge_pages_that_cannot_be_kept_give_back", no_huge_pages),
    ]
}

struct Vm {
    host: Host,
    sandbox: Sandbox,
    seen: usize,
}

impl Vm {
    /// A microVM with 1 vCPU and room for a container of 64 MiB.
    async fn start(behaviour: &str) -> Self {
        let mut host = Host::new(behaviour);
        host.config.growth_max_vcpus = 4;
        host.config.growth_max_memory_mib = 2048;
        let spec = SandboxSpec {
            memory_mib: 112,
            ..SandboxSpec::default()
        };
        let (sandbox, _) = host.start_as(spec).await.unwrap();
        let mut vm = Self {
            host,
            sandbox,
            seen: 0,
        };
        assert_eq!(vm.news(), ["boot 1 of 4 vCPUs, 112 and 2048 MiB"]);
        vm
    }

    /// What the fakes were asked since the last call, but for disks.
    fn news(&mut self) -> Vec<String> {
        let mut lines = self.host.requests().split_off(self.seen);
        self.seen += lines.len();
        lines.retain(|line| !line.starts_with("attach") && !line.starts_with("detach"));
        lines
    }

    async fn create(&self, id: &str, quota: i64, mib: i64) -> Result<(), Error> {
        self.create_with(id, &limits(quota, mib)).await
    }

    async fn create_with(&self, id: &str, resources: &str) -> Result<(), Error> {
        let spec = format!(
            r#"{{"ociVersion":"1.2.0","linux":{{"namespaces":[{{"type":"pid"}}],"resources":{resources}}}}}"#,
        );
        self.sandbox
            .create_container(container(id, &spec))
            .await
            .map(drop)
    }

    async fn end(self) {
        self.sandbox.stop(Duration::ZERO).await.unwrap();
        self.host.assert_empty();
    }
}

fn limits(quota: i64, mib: i64) -> String {
    let bytes = mib << 20;
    format!(r#"{{"cpu":{{"quota":{quota},"period":100000}},"memory":{{"limit":{bytes}}}}}"#)
}

async fn grows() {
    let mut vm = Vm::start("ok").await;
    vm.create("a", 50_000, 64).await.unwrap();
    assert_eq!(vm.news(), ["create a"]);
    vm.create("b", 150_000, 255).await.unwrap();
    // Before the container, so that it never has less than it may use.
    assert_eq!(vm.news(), ["hotplug 256 MiB", "online 2 vCPUs", "create b"]);
    let again = vm.create("b", 50_000, 64).await.unwrap_err();
    let kind = AgentErrorKind::AlreadyExists;
    assert!(
        matches!(again, Error::Agent { kind: k, .. } if k == kind),
        "{again:?}"
    );
    vm.create("c", 0, 100).await.unwrap();
    assert_eq!(vm.news(), ["hotplug 356 MiB", "online 3 vCPUs", "create c"]);
    vm.sandbox.delete_process("b", "").await.unwrap();
    assert_eq!(vm.news(), ["delete b", "hotplug 100 MiB"]);
    vm.sandbox.delete_process("a", "").await.unwrap();
    vm.sandbox.delete_process("c", "").await.unwrap();
    assert_eq!(
        vm.news(),
        ["delete a", "hotplug 36 MiB", "delete c", "hotplug 0 MiB"]
    );
    vm.end().await;
}

async fn updates() {
    let mut vm = Vm::start("ok").await;
    vm.create("a", 50_000, 64).await.unwrap();
    vm.news();
    let update = |quota, mib| vm.sandbox.update("a", limits(quota, mib).into_bytes());
    update(400_000, 164).await.unwrap();
    update(50_000, 96).await.unwrap();
    update(-1, -1).await.unwrap();
    vm.sandbox
        .update("a", b"{\"pids\":{\"limit\":9}}".to_vec())
        .await
        .unwrap();
    let expected = [
        "hotplug 100 MiB",
        "online 4 vCPUs",
        "update a",
        "update a",
        "hotplug 32 MiB",
        "hotplug 400 MiB",
        "update a",
        "update a",
    ];
    assert_eq!(vm.news(), expected);
    let error = vm
        .sandbox
        .update("a", b"no limits".to_vec())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error:?}");
    assert_eq!(vm.news(), [""; 0]);
    vm.end().await;
}

async fn refused() {
    let mut vm = Vm::start("update-refused").await;
    vm.create("a", 50_000, 64).await.unwrap();
    vm.news();
    let error = vm
        .sandbox
        .update("a", limits(0, 128).into_bytes())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("no such limit"), "{error}");
    assert_eq!(vm.news(), ["hotplug 64 MiB", "update a", "hotplug 0 MiB"]);
    vm.end().await;
}

async fn not_made() {
    let mut vm = Vm::start("create-refused").await;
    vm.create("a", 50_000, 128).await.unwrap_err();
    assert_eq!(
        vm.news(),
        ["hotplug 64 MiB", "create a", "delete a", "hotplug 0 MiB"]
    );
    vm.end().await;
}

async fn never_plugs() {
    let mut vm = Vm::start("never-plugs").await;
    let begin = Instant::now();
    let error = vm.create("a", 50_000, 128).await.unwrap_err();
    assert!(begin.elapsed() < Duration::from_secs(3));
    assert!(matches!(error, Error::Late { .. }), "{error:?}");
    assert!(error.to_string().contains("plug 64 MiB"), "{error}");
    assert_eq!(vm.news(), ["hotplug 64 MiB", "hotplug 0 MiB"]);
    vm.create("a", 50_000, 64).await.unwrap();
    assert_eq!(vm.news(), ["create a"]);
    vm.end().await;
}

async fn too_much() {
    let mut vm = Vm::start("ok").await;
    vm.create("a", 50_000, 1024).await.unwrap();
    vm.news();
    let error = vm.create("b", 50_000, 1024).await.unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error:?}");
    assert!(error.to_string().contains("2096 MiB"), "{error}");
    let error = vm
        .sandbox
        .update("a", limits(0, 4096).into_bytes())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error:?}");
    assert_eq!(vm.news(), [""; 0]);
    vm.end().await;
}

async fn no_room() {
    let mut host = Host::new("ok");
    host.config.growth_max_vcpus = 1;
    host.config.growth_max_memory_mib = 1;
    let (sandbox, _events) = host.start().await.unwrap();
    assert_eq!(host.requests(), ["boot 1 of 1 vCPUs, 512 and 0 MiB"]);
    sandbox.stop(Duration::ZERO).await.unwrap();
}

/// With 64 MiB of memory, and so many of huge pages of 2 MiB.
fn huge(mib: i64) -> String {
    let bytes = mib << 20;
    format!(
        r#"{{"memory":{{"limit":67108864}},"hugepageLimits":[{{"pageSize":"2MB","limit":{bytes}}},{{"pageSize":"1GB","limit":0}}]}}"#
    )
}

async fn huge_pages() {
    let mut vm = Vm::start("ok").await;
    vm.create_with("a", &huge(32)).await.unwrap();
    assert_eq!(
        vm.news(),
        ["hotplug 32 MiB", "huge pages 16x2097152", "create a"]
    );
    vm.create_with("b", &huge(3)).await.unwrap();
    // A page that is begun is a whole one.
    assert_eq!(
        vm.news(),
        ["hotplug 100 MiB", "huge pages 18x2097152", "create b"]
    );
    let less = huge(16).into_bytes();
    vm.sandbox.update("a", less).await.unwrap();
    assert_eq!(
        vm.news(),
        ["update a", "huge pages 10x2097152", "hotplug 84 MiB"]
    );
    vm.sandbox.delete_process("a", "").await.unwrap();
    assert_eq!(
        vm.news(),
        ["delete a", "huge pages 2x2097152", "hotplug 4 MiB"]
    );
    vm.sandbox.delete_process("b", "").await.unwrap();
    assert_eq!(vm.news(), ["delete b", "huge pages ", "hotplug 0 MiB"]);
    let wrong = r#"{"hugepageLimits":[{"pageSize":"2 MB","limit":1}]}"#;
    let error = vm.create_with("c", wrong).await.unwrap_err();
    assert!(error.to_string().contains("\"2 MB\" is no size"), "{error}");
    assert_eq!(vm.news(), [""; 0]);
    vm.end().await;
}

async fn no_huge_pages() {
    let mut vm = Vm::start("no-huge-pages").await;
    let error = vm.create_with("a", &huge(32)).await.unwrap_err();
    assert!(error.to_string().contains("no room"), "{error}");
    let expected = [
        "hotplug 32 MiB",
        "huge pages 16x2097152",
        "huge pages ",
        "hotplug 0 MiB",
    ];
    assert_eq!(vm.news(), expected);
    vm.create("a", 50_000, 64).await.unwrap();
    assert_eq!(vm.news(), ["create a"]);
    vm.end().await;
}
