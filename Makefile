# make demo      one whole research cycle in .demo-lab (or BLUEBERRY_LAB), no key and no GPU needed
# make browse    look at that lab in a browser
# make test      the tests           make check   ruff, mypy --strict, import-linter
# make bench     the benchmarks that can be run by hand
# make clean     remove caches; the environment and the lab stay

PYTHON ?= python3
LAB := $(or $(BLUEBERRY_LAB),.demo-lab)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo browse test check format bench install clean
.DEFAULT_GOAL := demo

demo: install
	@mkdir -p "$(LAB)"
	@test -e "$(LAB)/blueberry.toml" || cp docs/demo-lab.toml "$(LAB)/blueberry.toml"
	@$(BIN)/blueberry --lab "$(LAB)" auto-research --count 3 --max-cycles 1 --start-runner
	@$(BIN)/blueberry --lab "$(LAB)" runner stop >/dev/null

browse: install
	@$(BIN)/python -m db.notebook "$(LAB)"

test: install
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks docs/transcribe.py docs/studies/knob_effects.py docs/studies/ten_interventions.py
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: install
	@$(BIN)/python -m benchmarks

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (about a minute, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[runner,dev]'
	@touch $@

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
