# Everything a person does with the checkout. `make` alone explains the targets.
# Needs: Python 3.11, Rust (cargo), Go, gcc, make; root for `demo` and for the tests that start a
# cluster. All else is installed or built by the targets themselves, cached outside the tree.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
export TERCET_CACHE ?= $(HOME)/.cache/tercet
VENV := .venv
BIN := $(VENV)/bin
CARGO_KEY := $(shell rustc --version | cut -d" " -f2)
export CARGO_TARGET_DIR ?= $(TERCET_CACHE)/cargo/$(CARGO_KEY)
CARGO := cargo --color=never
MANIFEST := --manifest-path node-daemon/Cargo.toml
PACKAGES := crds operator csi node-daemon cli e2e

.PHONY: help demo test soak lint fmt generate lock bench report wheels images e2e-kind e2e-kind-smoke conformance clean install

help:  ## show this
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 16

demo: install  ## a volume survives the loss of its node, told step by step (root; a minute when warm)
	$(BIN)/python -m tercet_e2e demo

test: install  ## every tier of docs/testing.md, with a table of their times (root)
	$(BIN)/python -m tercet_e2e test

soak: install  ## ten minutes of linear, 10,000 simulated seeds, the long model check (root; docs/testing.md)
	$(BIN)/python -m tercet_e2e soak

lint: install  ## formats, types, clippy, import arrows, generated files, size limits
	$(BIN)/python -m tercet_e2e test --tier lint

fmt: install  ## format Python and Rust
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(CARGO) fmt $(MANIFEST) --all

generate: install  ## write crds/manifests from the models
	$(BIN)/python -m tercet_api.generate

bench: install  ## write build/bench.json: volumes beside the disk's own floor (root; Debian's fio)
	command -v fio >/dev/null || apt-get install -y fio
	$(BIN)/python -m tercet_e2e bench

report: install  ## print build/bench.json and build/evidence.json as tables
	$(BIN)/python -m tercet_e2e report

wheels: $(VENV)/.packages  ## build/wheels: our distributions and what they need, for the images
	rm -rf build/wheels && mkdir -p build/wheels
	$(BIN)/pip download -q --disable-pip-version-check --require-hashes --only-binary :all: \
	  -d build/wheels -r requirements/images.lock
	for each in crds operator csi node-daemon node-daemon/crates/engine; do \
	  $(BIN)/uv build -q --wheel --no-build-isolation --python $(BIN)/python -o build/wheels $$each; \
	done
	rm -f build/wheels/.gitignore

# Where `images` pushes ours to, if anywhere.
REGISTRY ?=

images: install wheels  ## images tercet-operator, tercet-csi, tercet-node (root); pushed to REGISTRY
	$(BIN)/python -m tercet_e2e images $(if $(REGISTRY),--push $(REGISTRY))

# What else the scenarios are told, e.g. --provider existing (e2e/README.md).
SCENARIOS ?=

e2e-kind: install wheels  ## the chart on real kubelets: kind, its node image, an engine of its own (root)
	$(BIN)/python -m pytest -s -m kind $(SCENARIOS) e2e/tests/test_e2e_docker.py e2e/tests/kind

e2e-kind-smoke: install wheels  ## of those only: installation, and the loss of a node
	$(BIN)/python -m pytest -s $(SCENARIOS) e2e/tests/kind/test_kind_1_install.py \
	  e2e/tests/kind/test_kind_2_nodes.py::test_node_loss

conformance: install  ## Linux's own NVMe/TCP host, in virtual machines, judges the target (root)
	$(BIN)/python -m pytest -s -m linux

lock:  ## resolve requirements/*.lock again
	$(PYTHON) -m venv build/lock && build/lock/bin/pip -q install uv
	build/lock/bin/uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-annotate \
	  -o requirements/bootstrap.lock requirements/bootstrap.in
	build/lock/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-annotate --all-extras \
	  $(foreach p,api operator csi node cli e2e,--no-emit-package tercet-$(p)) \
	  -o requirements/all.lock $(foreach p,$(PACKAGES),$(p)/pyproject.toml) requirements/development.in
	build/lock/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-annotate --extra controller --extra client -c requirements/all.lock \
	  $(foreach p,api operator csi node,--no-emit-package tercet-$(p)) \
	  -o requirements/images.lock $(foreach p,operator csi node-daemon crds,$(p)/pyproject.toml)
	cargo update --workspace $(MANIFEST)

clean:  ## remove what was built in this checkout (caches outside the tree stay)
	rm -rf build $(VENV)

# The environment: locked packages with hashes, then our own distributions, then the engine.
install: $(VENV)/.packages $(VENV)/.own engine

$(VENV)/.packages: requirements/bootstrap.lock requirements/all.lock
	@echo "== Python packages into $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements/bootstrap.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r requirements/all.lock
	touch $@

$(VENV)/.own: $(VENV)/.packages $(foreach p,$(PACKAGES),$(p)/pyproject.toml) \
  $(wildcard */hatch_build.py */proto/*.proto)
	@echo "== Tercet's own Python distributions"
	$(BIN)/uv pip install -q --python $(BIN)/python --no-build-isolation --no-deps \
	  $(foreach p,$(PACKAGES),-e ./$(p))
	touch $@

.PHONY: engine
engine: $(VENV)/.packages
	@echo "== tercet-engine and tercet-attach (release)"
	@# Checkouts share what is compiled, and cargo knows by times alone what is stale: it would take
	@# the crates of another checkout for this one's.
	@mkdir -p $(CARGO_TARGET_DIR)
	@test "$$(cat $(CARGO_TARGET_DIR)/.checkout 2>/dev/null)" = "$(CURDIR)" \
	  || find node-daemon -name target -prune -o -type f -exec touch {} +
	@echo "$(CURDIR)" > $(CARGO_TARGET_DIR)/.checkout
	$(CARGO) build $(MANIFEST) --release --locked -p tercet-engine --bins
	$(BIN)/uv pip install -q --python $(BIN)/python --no-build-isolation --no-deps ./node-daemon/crates/engine
