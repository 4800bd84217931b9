PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo study model_cards test test-lowest lint install

# make demo            the main job on the embedded default, about nine minutes on two cores: QLoRA
# make demo QUICK=1    smaller, one seed, about two minutes
# make demo FULL=1     all weights instead of adapters on a base in 4 bit
demo: install
	$(BIN)/trl-mprm demo $(if $(QUICK),--quick) $(if $(FULL),--full)

# make study           the paper's study in miniature, about four hours on two cores; stopped, it goes on when started again
study: install
	$(BIN)/python recipes/study/study.py

# make model_cards     the cards of one seed of the demo, copied and rendered again
SEED ?= 33
model_cards: install
	@ls runs/demo/seed-$(SEED)/*/model_card.json > /dev/null
	rm -f model_cards/miniature-mprm-*
	@for record in runs/demo/seed-$(SEED)/*/model_card.json; do \
		card=model_cards/miniature-mprm-$$(basename $$(dirname $$record)); \
		cp $$record $$card.json && $(BIN)/trl-mprm card $$card.json --output $$card.md || exit 1; \
	done

# make test            everything, two test files at once, one thread each
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# make test-lowest     the same with the lowest versions that pyproject.toml allows (needs uv)
test-lowest:
	uv venv --python $(PYTHON) .venv-lowest
	uv pip install --python .venv-lowest --resolution lowest-direct --editable ".[dev]"
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest --numprocesses 2 --dist loadfile

# make lint            ruff's checks and format, mypy's types
lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@
