# make demo and make test set everything up by themselves. TORCH=mine uses the torch that $(PYTHON) already has.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2

ifeq ($(TORCH),mine)
VENV_FLAGS = --system-site-packages
PIP_FLAGS =
else
VENV_FLAGS =
PIP_FLAGS = -c constraints.txt
endif

.PHONY: demo test test-clients test-imitation lint audit soak docs evidence launch-cost bench bench-cpu gpu clean

demo: $(VENV)/ready
	$(BIN)/rewardzip demo

test: $(VENV)/ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# tests against the real packages of others: heavy, so apart
test-clients: $(VENV)/ready
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -e ".[score,ray,onnx,clients]"
	$(BIN)/python -m pytest -m clients -n $(WORKERS) --dist loadfile --max-worker-restart 0 --durations 15

# imitation 1.0.1 needs older packages than the others: an environment of its own
test-imitation: .venv-imitation/ready
	PYTHONPATH=.:kernels .venv-imitation/bin/python -m pytest -W default --durations 5 tests/imitation_client.py

.venv-imitation/ready: tests/imitation-constraints.txt
	test -d .venv-imitation || $(PYTHON) -m venv .venv-imitation
	.venv-imitation/bin/python -m pip install --quiet -c tests/imitation-constraints.txt \
		imitation torch numba safetensors rich typer pytest
	touch $@

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(VENV)/ready
	$(BIN)/python -m rewardzip_kernels.audit

# the robustness run, for so many seconds
SECONDS ?= 600
soak: $(VENV)/ready
	PYTHONPATH=.:kernels:tests $(BIN)/python tests/soak.py --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

docs: $(VENV)/ready
	$(BIN)/python benchmarks/plots.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

evidence: $(VENV)/ready
	$(BIN)/python benchmarks/static_evidence.py --write docs/static-evidence.md

launch-cost: $(VENV)/ready
	$(BIN)/python benchmarks/launch_cost.py

bench: $(VENV)/ready
	$(BIN)/python benchmarks/models.py --out out/bench
	$(BIN)/python benchmarks/linear.py --out out/bench

# rivals that are not installed are left out of the table
bench-cpu: $(VENV)/ready
	$(BIN)/python benchmarks/cpu.py --out out/bench

# on a machine with a GPU; DRY=1 goes through every step without one. PARTS="tests bench" runs some of it
gpu: $(if $(DRY),$(VENV)/ready)
	PYTHON=$(if $(DRY),$(BIN)/python,$(PYTHON)) DRY=$(DRY) benchmarks/gpu.sh out/gpu $(PARTS)

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}"'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -e ".[rl,report,score,onnx,test,bench,lint,docs,build]"
	touch $@

clean:
	rm -rf $(VENV) .venv-imitation dist out .pytest_cache .mypy_cache .ruff_cache
