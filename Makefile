# Octavo's verbs. `make help` lists them; nothing here needs more than Debian 12, root (for the
# cluster), Go >= 1.26, Python >= 3.11, git and make. What is missing is named with its command.
PYTHON ?= python3
CLUSTER_TOOL := $(PYTHON) e2e/cluster/cli.py
PY := .venv/bin/python
KUBECONFIG_LINE = export KUBECONFIG=$$($(CLUSTER_TOOL) kubeconfig)

.DEFAULT_GOAL := help
.PHONY: help setup check test test-long test-gpu test-apiserver test-e2e demo demo-down cluster-up cluster-down \
  cluster-status images format lock crds tinymodel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## compiler, .venv from the lock files, Octavo itself (seconds when warm)
	@$(PYTHON) tools/setup.py

check: ## the quick inner loop: lint, types, import rules, unit tests (< 2 min)
	@$(PYTHON) tools/suites.py check

test: ## everything: check, a real API server, a real cluster (brings it up and down)
	@$(PYTHON) tools/suites.py test

test-long: ## full-size figures: long idle windows, big fuzz and fault counts
	@$(PYTHON) tools/suites.py test-long

test-gpu: ## on a machine with a GPU: kernels, engine, compute-sanitizer (none of it in `make test`)
	@$(PYTHON) tools/suites.py test-gpu

test-apiserver: ## only the tests against etcd and kube-apiserver
	@$(PYTHON) tools/suites.py test-apiserver

test-e2e: ## only the cluster suite
	@$(PYTHON) tools/suites.py test-e2e

demo: ## from a bare machine to an answer and a scale-up; leaves the cluster running
	@$(PYTHON) tools/setup.py
	@$(PY) e2e/demo.py

demo-down: ## end what `make demo` left running
	@$(CLUSTER_TOOL) down

cluster-up: ## one real Kubernetes node on this machine
	@$(CLUSTER_TOOL) up

cluster-down: ## stop it and remove what it made (state: down --purge)
	@$(CLUSTER_TOOL) down

cluster-status: ## what runs
	@$(CLUSTER_TOOL) status

images: ## build both images and push them to the cluster's registry
	@$(CLUSTER_TOOL) images

format: setup ## format and fix what can be fixed
	@.venv/bin/ruff format . && .venv/bin/ruff check --fix .

lock: setup ## resolve requirements/*.lock again from pyproject.toml
	@$(PY) tools/lock.py

crds: ## copy the CRD into the chart
	@cp crds/llmservice.yaml charts/octavo/files/llmservice.yaml

tinymodel: setup ## train the tiny model again (an hour on 2 cores, minutes on a GPU)
	@$(PY) e2e/tinymodel/train.py

clean: ## remove build output of this checkout (caches stay)
	@rm -rf build dist .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
