# Two commands for a new machine: make demo, make test. See README.md.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do command -v $$p >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.zerodeploy-$(1)
WORKERS ?= 3

.PHONY: demo test check bench format proto servers clean
.DELETE_ON_ERROR:

demo: $(call STAMP,run)
	$(BIN)/zerodeploy demo

test: $(call STAMP,test) servers
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

check: $(call STAMP,check)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_structure.py

format: $(call STAMP,check)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The compiled form of jobs.proto, from which the messages are made at run time; a test compares the two.
proto: $(call STAMP,test)
	$(BIN)/python -m grpc_tools.protoc -I zerodeploy/jobs/grpcserver --descriptor_set_out=zerodeploy/jobs/grpcserver/jobs.binpb jobs.proto

bench: $(call STAMP,bench) servers
	@command -v rsync >/dev/null 2>&1 || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null 2>&1 && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends rsync >/dev/null 2>&1; } || true
	$(BIN)/python -m tests.bench $(BENCH_ARGS)

# A virtual environment without its ensurepip too: Debian splits that off (python3-venv).
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) 2>/dev/null || { \
	  rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install -q pip; } || { \
	  rm -rf $(VENV); $(PYTHON) -m pip install -q --user virtualenv --break-system-packages && $(PYTHON) -m virtualenv -q $(VENV); }

$(call STAMP,run): $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	touch $@

$(call STAMP,test): $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	touch $@

$(call STAMP,check): $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,check]'
	touch $@

$(call STAMP,bench): $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test,bench]'
	touch $@

# openssh-server, sudo for the tests of command prefixes, ip for those of networks and busybox for hosts without Python, where
# apt may be used; else the tests that need them skip.
servers:
	@command -v sshd >/dev/null 2>&1 || test -x /usr/sbin/sshd || if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	  echo "installing openssh-server"; \
	  { apt-get update -qq; printf '#!/bin/sh\nexit 101\n' > /tmp/zerodeploy-policy && test ! -e /usr/sbin/policy-rc.d && install -m 755 /tmp/zerodeploy-policy /usr/sbin/policy-rc.d && made=1; \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends openssh-server openssh-client procps; \
	    test -n "$$made" && rm -f /usr/sbin/policy-rc.d; rm -f /tmp/zerodeploy-policy; } >/dev/null 2>&1 || true; \
	else echo "no sshd here and no right to install one: tests that need it will skip"; fi
	@for each in sudo:sudo ip:iproute2 busybox:busybox-static; do command -v $${each%:*} >/dev/null 2>&1 || \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	    { install="apt-get install -y -qq --no-install-recommends $${each#*:}"; export DEBIAN_FRONTEND=noninteractive; \
	      $$install || { apt-get update -qq; $$install; }; } >/dev/null 2>&1 || true; fi; done

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
