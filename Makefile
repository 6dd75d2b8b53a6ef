# Every target makes its own environment first: only Python ≥ 3.11 and make are needed.
PYTHON ?= python3
PROFILE ?= lab
REPLICATES ?= 1
FRESH ?=
KEEP ?=
EXECUTOR ?= local
LIMIT ?=
DEVICE ?=
DTYPE ?=
BATCH_SIZE ?=
YES ?=
PROMPT ?=

BIN := .venv/bin
READY := .venv/.ready
READY_DEV := .venv/.ready-dev
RUN := $(BIN)/python -m benchmarks
# the flag where the variable is on; other words than these are refused
switch = $(if $(filter 1 yes true on,$($1)),$2,$(if $(filter-out 0 no false off,$($1)), \
	$(error $1 should be 1 or 0, got $($1))))
# what differs from its default is passed on; a command refuses what means nothing for it
OPTIONS = --profile $(PROFILE) $(if $(filter-out 1,$(REPLICATES)),--replicates $(REPLICATES)) \
	$(call switch,FRESH,--fresh) $(call switch,KEEP,--keep) \
	$(if $(filter-out local,$(EXECUTOR)),--executor $(EXECUTOR)) $(if $(LIMIT),--limit $(LIMIT)) \
	$(if $(DEVICE),--device $(DEVICE)) $(if $(DTYPE),--dtype $(DTYPE)) \
	$(if $(BATCH_SIZE),--batch-size $(BATCH_SIZE))
# targets that run no command of the suite's refuse, before anything runs, all variables but those they take
TAKEN_BY_check := FRESH
$(foreach target,$(filter demo check speed throughput,$(MAKECMDGOALS)), \
	$(foreach name,$(filter-out $(TAKEN_BY_$(target)),PROFILE REPLICATES FRESH KEEP EXECUTOR LIMIT DEVICE DTYPE BATCH_SIZE), \
		$(if $(filter command%,$(origin $(name))),$(error $(target) does not take $(name)))))
# every file of benchmarks/figures that draws one, by its name
FIGURES := $(subst _,-,$(filter-out __init__ base methods registry style, \
	$(basename $(notdir $(wildcard benchmarks/figures/*.py)))))

.DEFAULT_GOAL := help
.PHONY: help demo smoke reproduce models figures summaries claims report estimate check verify $(FIGURES) speed throughput test faults lint format docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  One figure, drawn from its table (measured if there is none), by make and a name of these:"
	@echo "$(FIGURES)" | fold -s -w 100 | sed 's/^/    /'
	@echo "  Options: PROFILE=$(PROFILE) (a file of benchmarks/spec/profiles), REPLICATES=$(REPLICATES), FRESH=1 (measure again),"
	@echo "    KEEP=1 (measure only replicates that the tables lack), EXECUTOR=ray (run on the cluster at RAY_ADDRESS)"
	@echo "  For profiles of real models: LIMIT=8 (so many prompts of each objective, as a trial), DEVICE=, DTYPE=, BATCH_SIZE="

demo: export DEMO_PROMPT = $(value PROMPT)
demo: $(READY) ## steer a prompt in four ways with the committed models of the lab (PROMPT="how do i bake a cake ?")
	@$(BIN)/python scripts/demo.py --prompt "$$DEMO_PROMPT"

smoke: PROFILE = smoke
smoke: $(READY) ## everything at small scale, from training to verdicts and figures/smoke
	$(if $(filter command%,$(origin PROFILE)),$(error smoke is a profile of its own: use make reproduce PROFILE=$(PROFILE)))
	$(RUN) reproduce $(OPTIONS)

reproduce: $(READY) ## train the lab, measure every table, draw every figure: 60 minutes for each of REPLICATES
	$(RUN) reproduce $(OPTIONS)

models: $(READY) ## train the lab's models and report their quality
	$(RUN) models $(OPTIONS)

figures: $(READY) ## draw every figure that has a table, and the report; measures nothing
	$(RUN) figures $(OPTIONS)

summaries: $(READY) ## recompute the summaries (CSV) from the rows (parquet), and draw the figures
	$(RUN) summaries $(OPTIONS)

report: $(READY) ## write one page with verdicts, junctions and every figure: figures/PROFILE/report.html
	$(RUN) $@ $(OPTIONS)

claims: $(READY) ## print the verdict on every claim; of the lab, write docs/results.md and the README's table
	$(RUN) claims $(OPTIONS)

check: $(READY_DEV) ## retrain a small profile and compare its metrics with the committed ones (FRESH=1 replaces these)
	$(BIN)/python -m benchmarks check $(call switch,FRESH,--fresh)

verify: $(READY) ## check that summaries, verdicts and figures follow from the rows, and files and models are whole; changes nothing
	$(RUN) $@ $(OPTIONS)

estimate: $(READY) ## estimate GPU hours of the figures of a profile of real models (PROFILE=qwen3-8b)
	$(RUN) $@ $(OPTIONS)

$(FIGURES): $(READY)
	$(RUN) $@ $(OPTIONS)

speed: $(READY) ## time decoding against model.generate, into results/speed.csv: 13 minutes
	$(BIN)/python -m benchmarks.perf.speed

throughput: $(READY) ## time steering in batches against plain decoding, into results/throughput.csv: 13 minutes
	$(BIN)/python -m benchmarks.perf.throughput

test: $(READY_DEV) ## run the test suite
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

faults: $(READY_DEV) ## test recovery: kill runs, damage files, fill the disk, lose nodes of a cluster; 15 to 24 minutes
	$(BIN)/python -m pytest -m faults

lint: $(READY_DEV) ## check style, types and directions of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY_DEV) ## build the documentation site into site/ (warnings are errors)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(READY_DEV) ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## list what runs and tools left behind (models, cells, smoke), and delete it if you agree (YES=1: without asking)
	@$(PYTHON) scripts/clean.py $(call switch,YES,--yes)

.DEFAULT:
	@echo "there is no target '$@': make help lists them" >&2; exit 2

# pip -qq shows errors and hides warnings. The first run caches the bytecode of what it uses, where the
# environment forbids writing it too; for the tests that of all packages is made, on all cores.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL = $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --constraint constraints.txt \
	torch==2.13.0 --config-settings editable_mode=compat --editable
CACHE_ALL = @$(BIN)/python -m compileall -qq -j 0 .venv/lib || true

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sia needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0])'
	@echo "setting up .venv (once: about a minute from a near mirror, and 2 GB of disk)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP_INSTALL) '.[bench]'
	@touch $(READY)

$(READY_DEV): $(READY)
	@echo "adding what tests and documentation need to .venv (once)"
	@$(PIP_INSTALL) '.[dev]'
	$(CACHE_ALL)
	@touch $(READY_DEV)
