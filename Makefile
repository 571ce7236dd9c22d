# Caisson: build, show, test, measure. Every target does its own set-up.
#
#   make demo     build everything and run a container in a microVM
#   make test     formatting, lints, unit tests, end-to-end tests
#   make build    out/: a prefix tree to run from, or to copy to /usr/local (make install)
#   make soak     50 pods at a time by containerd 2.x, 10 rounds (SOAK=PODSxROUNDS), and 50,000
#                 files on a volume (SOAK_FILES)
#   make fuzz     hostile guests and streams, FUZZ_SECONDS for each target (needs nightly Rust)
#   make bench    measurements beside peers, into out/bench/
#   make image    the image that installs Caisson on a cluster's nodes (deploy/)
#
# Where this host's KVM cannot run a stock guest, demo, test and bench use the testbed
# (tests/testbed), an emulated machine whose KVM can.

CARGO ?= cargo
PREFIX ?= /usr/local
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
AGENT_TARGET := x86_64-unknown-linux-gnu
CACHE := $(or $(CAISSON_CACHE),$(HOME)/.cache/caisson)
SOAK ?= 50x10
SOAK_FILES ?= 50000
FUZZ_SECONDS ?= 60
FUZZ_VERSION := 0.13.2
FUZZ := $(CACHE)/cargo-fuzz-$(FUZZ_VERSION)/bin/cargo-fuzz
DENY_VERSION := 0.20.2
DENY := $(CACHE)/cargo-deny-$(DENY_VERSION)/bin/cargo-deny
HOST_CRATES := caisson caisson-shim caisson-vmm caisson-fs caisson-rootfs-builder

# What the build and the tests call. The kernel's and the testbed's scripts install their own.
PACKAGES := gcc libc6-dev make pkg-config libcap-ng-dev libseccomp-dev protobuf-compiler \
	busybox-static e2fsprogs erofs-utils util-linux

.PHONY: build demo test lint unit e2e soak fuzz bench image setup programs guest install clean

build: programs guest
	install -D -t out/share/caisson/deploy deploy/caisson-node

demo: build
	tests/demo

test: lint unit build e2e

lint: setup $(DENY)
	$(CARGO) fmt --all --check
	$(CARGO) fmt --manifest-path tests/fuzz/Cargo.toml --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) clippy -p caisson-tests --test e2e --locked -- -D warnings
	$(DENY) --offline check bans licenses sources

$(DENY): | setup
	$(CARGO) install cargo-deny --version $(DENY_VERSION) --locked --quiet --root $(CACHE)/cargo-deny-$(DENY_VERSION)

unit: setup
	$(CARGO) test --workspace --exclude caisson-tests --locked
	$(CARGO) test -p caisson-tests --lib --bins --locked

e2e: build
	tests/run --jobs 2

soak: build
	CAISSON_SOAK_FILES=$(SOAK_FILES) tests/run --filter storage::calls::many_files
	CAISSON_SOAK=$(SOAK) TESTBED_MEM=$${TESTBED_MEM:-8G} tests/run --filter containerd::pods::two::many_at_once

# The network device wants root, for a tap.
fuzz: setup $(FUZZ)
	@rustc +nightly --version >/dev/null 2>&1 || { echo "fuzzing needs nightly Rust: rustup toolchain install nightly" >&2; exit 1; }
	set -e; for target in $(patsubst tests/fuzz/fuzz_targets/%.rs,%,$(wildcard tests/fuzz/fuzz_targets/*.rs)); do \
		mkdir -p out/fuzz/$$target; \
		RUSTUP_TOOLCHAIN=nightly $(FUZZ) run --fuzz-dir tests/fuzz --target-dir $(abspath $(TARGET_DIR))/fuzz $$target out/fuzz/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=4096 -timeout=20 -print_final_stats=1; \
	done

$(FUZZ): | setup
	$(CARGO) install cargo-fuzz --version $(FUZZ_VERSION) --locked --quiet --root $(CACHE)/cargo-fuzz-$(FUZZ_VERSION)

bench: build
	tests/bench/run

setup:
	@missing=$$(dpkg-query -W -f '$${Package} $${db:Status-Abbrev}\n' $(PACKAGES) 2>/dev/null \
		| awk -v want="$(PACKAGES)" '$$2 == "ii" { have[$$1] } \
			END { n = split(want, w); for (i = 1; i <= n; i++) if (!(w[i] in have)) print w[i] }'); \
	if [ -n "$$missing" ]; then \
		[ "$$(id -u)" = 0 ] || { echo "missing packages; as root: apt-get install" $$missing >&2; exit 1; }; \
		echo "installing:" $$missing; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi
	@command -v $(CARGO) >/dev/null || { echo "$(CARGO) not found: install Rust (https://rustup.rs), version $$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or newer" >&2; exit 1; }

# The agent is PID 1 of a guest without libraries: static. With a --target of its own the flag
# does not reach build scripts and procedural macros.
programs: setup
	$(CARGO) build --release --locked $(addprefix -p ,$(HOST_CRATES))
	RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --release --locked \
		--target $(AGENT_TARGET) -p caisson-agent
	install -D -t out/bin $(TARGET_DIR)/release/caisson $(TARGET_DIR)/release/containerd-shim-caisson-v2
	install -D -t out/libexec/caisson $(TARGET_DIR)/release/caisson-vmm $(TARGET_DIR)/release/caisson-fs

guest: programs
	guest-kernel/build.sh --out out/share/caisson/vmlinux
	$(TARGET_DIR)/release/caisson-guest-image \
		--agent $(TARGET_DIR)/$(AGENT_TARGET)/release/caisson-agent --out out/share/caisson/guest.erofs

install:
	@[ -e out/share/caisson/guest.erofs ] || { echo "nothing to install yet: run 'make build' first" >&2; exit 1; }
	install -d $(DESTDIR)$(PREFIX)
	cp -a out/bin out/libexec out/share $(DESTDIR)$(PREFIX)/

# The programs are linked against the host's C library, which the image has with it.
image: build
	rm -rf out/image
	mkdir -p out/image/rootfs/bin out/image/rootfs/caisson
	for applet in $$(/bin/busybox --list); do ln -sfn busybox out/image/rootfs/bin/$$applet; done
	cp --remove-destination /bin/busybox out/image/rootfs/bin/
	cp out/share/caisson/deploy/caisson-node out/image/rootfs/bin/
	cp -a out/bin out/libexec out/share out/image/rootfs/caisson/
	ldd out/bin/caisson | grep -o '/[^ ]*' | while read -r library; do \
		install -D "$$(readlink -f $$library)" out/image/rootfs$$library; done
	cp deploy/Containerfile out/image/
	@builder=$$(command -v podman || command -v docker) || { echo "neither podman nor docker is here to build the image; its context is out/image" >&2; exit 1; }; \
	$$builder build -t caisson-node:latest -f out/image/Containerfile out/image

clean:
	$(CARGO) clean
	rm -rf out
