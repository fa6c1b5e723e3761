# make            everything for config/tiny.toml: environment, tokenizer, dataset, training
#                 (interrupted and resumed), sampling
# make test       runs the fast tests
# make test-all   runs the long tests too
# make lint       checks style and format
# make torture    kills training 100 times, mostly while it saves, and checks that nothing is lost
# make clean      removes what `make` wrote (data/tiny, out/tiny), and nothing else
#
# An active virtual or conda environment that satisfies pyproject.toml is used as it is. Otherwise
# VENV is created. You can set PYTHON and VENV: make PYTHON=python3.11 VENV=/scratch/me/venv

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ACTIVE := $(shell [ -n "$$VIRTUAL_ENV$$CONDA_PREFIX" ] && python tests/environment.py && echo yes)
ifeq ($(ACTIVE),yes)
  PY := python
  READY :=
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/.ready
endif

CONFIG := config/tiny.toml
.DEFAULT_GOAL := path
.PHONY: path test test-all torture lint clean

path: $(READY)
	$(PY) train_tokenizer.py $(CONFIG)
	$(PY) prepare.py $(CONFIG)
	@if [ ! -d out/tiny/checkpoints ]; then \
		echo "-- training, stopped on the way to show that it resumes"; \
		$(PY) rocket.py $(CONFIG) --train.stop_at_step=100 || exit 1; \
		echo "-- the same command again goes on"; \
	fi
	$(PY) rocket.py $(CONFIG)
	$(PY) sample.py out/tiny --prompt="$$(printf 'import os\nimport sys\n\ndef ')" --temperature=0.5
	$(PY) tests/compare_xz.py out/tiny

# Two tests run at a time, because most wait for processes to start. JOBS=1 runs one at a time.
test: $(READY)
	$(PY) -m pytest -n $(JOBS) --dist worksteal

test-all: $(READY)
	$(PY) -m pip install --quiet -r tests/requirements.txt
	$(PY) -m pytest -n $(JOBS) --dist worksteal -m "not slurm"
	$(PY) -m pytest -m "slurm and not torture"

torture: $(READY)
	$(PY) tests/torture.py
	$(PY) -m pytest -m torture

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

$(VENV)/.ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Rocket needs Python 3.10 or later: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

clean:
	rm -rf data/tiny out/tiny
