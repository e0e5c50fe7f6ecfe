# The commands of this repository. `make help` lists them; see README.md.
#
# CARGO_TARGET_DIR is honoured; without it everything is built under ${XDG_CACHE_HOME:-~/.cache}/slackwater.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Cargo and the lab use all processors by themselves; two targets at once would only compete.
.NOTPARALLEL:

root := $(patsubst %/,%,$(dir $(realpath $(lastword $(MAKEFILE_LIST)))))
cache := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/slackwater
install := $(root)/tests/setup/install

export CARGO_TARGET_DIR := $(or $(CARGO_TARGET_DIR),$(cache)/target)
# Where rustup and `cargo install` put programs: a fresh machine's PATH may lack it.
export PATH := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH)
# A snapshot that differs is a failed test; no new file is written.
export INSTA_UPDATE ?= no

rust_needed := $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' $(root)/Cargo.toml)
bins := $(CARGO_TARGET_DIR)/debug

# The features with which tests inject faults: in the programs that the tests run, and never in those of the demo.
faults := --features slackwater-node-agent/faults,slackwater-operator/faults
# The programs that the lab starts.
programs := --package slackwater-operator --package slackwater-node-agent --package slackwater-reference-vmm \
  --package slackwater-lab --package slackwater-bench --bins

cargo := cd "$(root)" && cargo

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' "$(root)/Makefile" | expand -t 20

.PHONY: demo
demo: rust ## move a VM with its devices between two nodes, and verify it (VMM=qemu DEMO="--devices 4")
	"$(install)" host-packages node-kernel kubernetes kubectl-helm
	$(cargo) build --locked $(programs)
	"$(bins)/slackwater-demo" $(if $(VMM),--vmm $(VMM)) $(DEMO)

.PHONY: test
test: rust rust-components ## all checks: format, lints, unit tests, the lab's end-to-end tests
	"$(install)"
	$(cargo) fmt --all --check
	$(cargo) clippy --locked --workspace --all-targets $(faults) -- -D warnings
	$(cargo) build --locked $(programs) $(faults)
	$(cargo) nextest run --locked --workspace $(faults) --no-fail-fast
	$(cargo) test --locked --workspace --doc $(faults)

.PHONY: fault-matrix
fault-matrix: rust ## every fault in every phase, into tests/fault-matrix.md (VMM=qemu; about an hour)
	"$(install)" host-packages node-kernel kubernetes kubectl-helm
	$(cargo) build --locked $(programs) $(faults)
	"$(bins)/slackwater-fault-matrix" $(if $(VMM),--vmm $(VMM)) \
	  --out "$(root)/tests/fault-matrix$(if $(VMM),-$(VMM)).md" $(MATRIX)

.PHONY: random-walk
random-walk: rust ## 1,000 migrations, each with a random fault (STEPS=50 SEED=7)
	"$(install)" host-packages node-kernel kubernetes kubectl-helm
	$(cargo) build --locked $(programs) $(faults)
	SLACKWATER_WALK_STEPS="$(or $(STEPS),1000)" SLACKWATER_WALK_SEED="$(or $(SEED),$(shell date +%s))" \
	  cargo test --locked --workspace --test faults $(faults) -- --nocapture after_random_faults

.PHONY: linux-guest
linux-guest: rust ## a Linux in a QEMU VM moves ten times, with a shared disk (MIGRATIONS=2)
	"$(install)" host-packages node-kernel kubernetes kubectl-helm
	$(cargo) build --locked $(programs) $(faults)
	SLACKWATER_LINUX_MIGRATIONS="$(or $(MIGRATIONS),10)" \
	  cargo test --locked --workspace --test migration $(faults) -- --ignored --nocapture a_linux

.PHONY: bench-qemu
bench-qemu: rust ## compare Slackwater's migration with QEMU's own (BENCH="--rounds 10 --guest linux")
	"$(install)" host-packages node-kernel kubernetes kubectl-helm
	$(cargo) build --locked --release $(programs)
	"$(CARGO_TARGET_DIR)/release/slackwater-bench-qemu" --json "$(CARGO_TARGET_DIR)/bench-qemu.json" $(BENCH)

.PHONY: lint
lint: rust rust-components ## format, lints, and the rules for dependencies
	"$(install)" cargo-deny
	$(cargo) fmt --all --check
	$(cargo) clippy --locked --workspace --all-targets -- -D warnings
	$(cargo) clippy --locked --workspace --all-targets $(faults) -- -D warnings
	$(cargo) deny --locked check bans licenses sources

.PHONY: generate
generate: rust ## write the CRDs' YAML from operator/api
	$(cargo) run --locked --package slackwater-operator -- crds --out charts/slackwater/crds

.PHONY: clean-lab
clean-lab: ## remove what the set-up has built for the lab (about 10 minutes to build again)
	rm -rf -- "$(cache)"/{node-kernel,kubernetes,kubectl-helm}-* "$(cache)"/{host-packages,cargo-tools}

.PHONY: rust
rust:
	@command -v cargo >/dev/null && command -v rustc >/dev/null || { \
	  echo "error: no Rust on this machine. Install stable Rust $(rust_needed) or newer with rustup, then run make again." >&2; exit 1; }
	@has=$$(rustc --version | cut -d ' ' -f 2 | cut -d - -f 1); \
	[ "$$(printf '%s\n' "$(rust_needed)" "$$has" | sort -V | head -n 1)" = "$(rust_needed)" ] || { \
	  echo "error: Rust $(rust_needed) or newer is needed, and this is $$has: rustup update stable" >&2; exit 1; }

.PHONY: rust-components
rust-components:
	@for component in fmt clippy; do \
	  cargo $$component --version >/dev/null 2>&1 || { \
	    echo "error: cargo $$component is missing: rustup component add rustfmt clippy" >&2; exit 1; }; \
	done
