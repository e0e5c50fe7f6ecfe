# The commands for working with this repository. `make help` lists them; CONTRIBUTING.md says more.
#
# CARGO_TARGET_DIR is honoured. By default all build output goes to ${XDG_CACHE_HOME:-~/.cache}/slackwater.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Cargo and the lab already use all processors: two targets at once would only slow each other down.
.NOTPARALLEL:

root := $(patsubst %/,%,$(dir $(realpath $(lastword $(MAKEFILE_LIST)))))
cache := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/slackwater
install := $(root)/tests/setup/install

export CARGO_TARGET_DIR := $(or $(CARGO_TARGET_DIR),$(cache)/target)
# Where rustup and `cargo install` put programs. On a fresh machine this may not be in PATH yet.
export PATH := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH)
# A snapshot that differs fails the test and writes no new file into the tree.
export INSTA_UPDATE ?= no

rust_needed := $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' $(root)/Cargo.toml)
bins := $(CARGO_TARGET_DIR)/debug

# Fault injection: enabled in the programs that the tests run, never in those of the demo.
faults := --features slackwater-node-agent/faults,slackwater-operator/faults
# The programs that the lab starts.
programs := --package slackwater-operator --package slackwater-node-agent --package slackwater-reference-vmm \
  --package slackwater-lab --package slackwater-bench --bins

cargo := cd "$(root)" && cargo

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' "$(root)/Makefile" | expand -t 20

.PHONY: demo
demo: rust ## migrate a VM between two lab nodes and verify it (VMM=qemu: Linux under QEMU; DEMO="--devices 4")
	"$(install)" host-packages node-kernel kubernetes kubectl-helm
	$(cargo) build --locked $(programs)
	"$(bins)/slackwater-demo" $(if $(VMM),--vmm $(VMM)) $(DEMO)

.PHONY: test
test: rust rust-components ## run all checks: format, clippy, unit tests, end-to-end tests on the lab
	"$(install)"
	$(cargo) fmt --all --check
	$(cargo) clippy --locked --workspace --all-targets $(faults) -- -D warnings
	$(cargo) build --locked $(programs) $(faults)
	$(cargo) nextest run --locked --workspace $(faults) --no-fail-fast
	$(cargo) test --locked --workspace --doc $(faults)

.PHONY: fault-matrix
fault-matrix: rust ## inject every fault at every phase, about an hour; writes tests/fault-matrix.md (VMM=qemu: its own)
	"$(install)" host-packages node-kernel kubernetes kubectl-helm
	$(cargo) build --locked $(programs) $(faults)
	"$(bins)/slackwater-fault-matrix" $(if $(VMM),--vmm $(VMM)) \
	  --out "$(root)/tests/fault-matrix$(if $(VMM),-$(VMM)).md" $(MATRIX)

.PHONY: test-attacks
test-attacks: rust ## try a twin's arguments as attacks on a lab of two nodes (those without a lab are in `make test`)
	"$(install)" host-packages node-kernel kubernetes kubectl-helm
	$(cargo) build --locked $(programs) $(faults)
	$(cargo) test --locked --workspace --test migration $(faults) -- --ignored --nocapture attack

.PHONY: random-walk
random-walk: rust ## run 1,000 migrations with randomly drawn faults (STEPS=50 SEED=7)
	"$(install)" host-packages node-kernel kubernetes kubectl-helm
	$(cargo) build --locked $(programs) $(faults)
	SLACKWATER_WALK_STEPS="$(or $(STEPS),1000)" SLACKWATER_WALK_SEED="$(or $(SEED),$(shell date +%s))" \
	  cargo test --locked --workspace --test faults $(faults) -- --nocapture after_random_faults

.PHONY: linux-guest
linux-guest: rust ## migrate a Linux guest under QEMU ten times while it uses devices and disk (MIGRATIONS=2)
	"$(install)" host-packages node-kernel kubernetes kubectl-helm
	$(cargo) build --locked $(programs) $(faults)
	SLACKWATER_LINUX_MIGRATIONS="$(or $(MIGRATIONS),10)" \
	  cargo test --locked --workspace --test migration $(faults) -- --ignored --nocapture a_linux

.PHONY: bench-qemu
bench-qemu: rust ## compare QEMU's own migration with Slackwater's (BENCH="--rounds 10 --guest linux")
	"$(install)" host-packages node-kernel kubernetes kubectl-helm
	$(cargo) build --locked --release $(programs)
	"$(CARGO_TARGET_DIR)/release/slackwater-bench-qemu" --json "$(CARGO_TARGET_DIR)/bench-qemu.json" $(BENCH)

.PHONY: bench-fleet
bench-fleet: rust ## many migrations at once: what they cost the operator (BENCH="--sizes 50x100 --ended 0")
	"$(install)" host-packages kubernetes kubectl-helm
	$(cargo) build --locked --release --package slackwater-operator --package slackwater-bench --bins
	"$(CARGO_TARGET_DIR)/release/slackwater-bench-fleet" $(BENCH)

.PHONY: lint
lint: rust rust-components ## check format, clippy, dependencies (cargo-deny) and spelling (typos)
	"$(install)" cargo-deny typos
	$(cargo) fmt --all --check
	$(cargo) clippy --locked --workspace --all-targets -- -D warnings
	$(cargo) clippy --locked --workspace --all-targets $(faults) -- -D warnings
	"$(root)/node-agent/check-release"
	$(cargo) deny --locked check bans licenses sources
	cd "$(root)" && typos

.PHONY: generate
generate: rust ## generate the CRD YAML from operator/api
	$(cargo) run --locked --package slackwater-operator -- crds --out charts/slackwater/crds

.PHONY: clean-lab
clean-lab: ## remove what the set-up has built for the lab (rebuilding it takes about 10 minutes)
	rm -rf -- "$(cache)"/{node-kernel,kubernetes,kubectl-helm}-* "$(cache)"/{host-packages,cargo-tools}

.PHONY: rust
rust:
	@command -v cargo >/dev/null && command -v rustc >/dev/null || { \
	  echo "error: no Rust on this machine. Install stable Rust $(rust_needed) or newer with rustup, then run make again." >&2; exit 1; }
	@has=$$(rustc --version | cut -d ' ' -f 2 | cut -d - -f 1); \
	[ "$$(printf '%s\n' "$(rust_needed)" "$$has" | sort -V | head -n 1)" = "$(rust_needed)" ] || { \
	  echo "error: Rust $(rust_needed) or newer is needed, and this machine has $$has: rustup update stable" >&2; exit 1; }

.PHONY: rust-components
rust-components:
	@for component in fmt clippy; do \
	  cargo $$component --version >/dev/null 2>&1 || { \
	    echo "error: cargo $$component is missing: rustup component add rustfmt clippy" >&2; exit 1; }; \
	done
