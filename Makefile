# make demo | test | lint | claims        each installs what it needs into .venv the first time
#
# PYTHON=python3.12      the interpreter that .venv is made with, 3.11 or later
# INDEX=URL              the package index to install from
# EXTRA_INDEX=URL        a further one, e.g. one that offers torch built for your GPU, or without GPU support
#
# What is installed stays as it is until pyproject.toml or constraints.txt changes; delete .venv to choose another build of torch.

PYTHON ?= python3
INDEX ?=
EXTRA_INDEX ?=

VENV := .venv
RUN := $(VENV)/bin/python
INSTALL = $(RUN) -m pip install --disable-pip-version-check -c constraints.txt \
	$(if $(INDEX),--index-url $(INDEX)) $(if $(EXTRA_INDEX),--extra-index-url $(EXTRA_INDEX))

.PHONY: help venv demo test lint claims
.NOTPARALLEL:

help:
	@sed -n -e '/^#/!q' -e 's/^# \{0,1\}//p' Makefile

venv: $(VENV)/.installed

# Completions side by side, plain and speculative; what was saved; the proof that the outputs are identical; a chart.
demo: $(VENV)/.installed
	$(RUN) -m fewstep.report.demo

# Everything that is exact and quick, two tests at a time, with the slowest 20.
test: $(VENV)/.installed-dev
	$(RUN) -m pytest -n 2 -m "not claims"

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check fewstep tests benchmarks
	$(RUN) -m ruff format --check fewstep tests benchmarks
	$(RUN) -m mypy

# Everything that needs large samples, live peers or an idle machine.
claims: $(VENV)/.installed-dev $(VENV)/.installed-peers $(VENV)/.installed-gpu
	$(RUN) -m pytest -m claims
	$(RUN) -m pytest tests/laws/test_triton.py
	$(VENV)/bin/fewstep reproduce --all
	set -e; for script in benchmarks/*.py; do $(RUN) $$script; done

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(INSTALL) -e '.[$*]'
	@touch $@

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("PYTHON=$(PYTHON) is Python %d.%d: fewstep needs 3.11 or later; set PYTHON, e.g. make demo PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
