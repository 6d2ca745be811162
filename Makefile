# make quickstart   set up .venv if needed, then train, quantize and compare on the embedded data
# make test         set up .venv if needed, then lint and run the tests
# make lint         ruff and mypy
PY := .venv/bin/python

.PHONY: quickstart test lint setup
quickstart: .venv/.ready
	@$(PY) tools/quickstart.py

test: lint
	@$(PY) -m pytest

lint: .venv/.ready
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy gdrq_mm

setup: .venv/.ready

.venv/.ready: requirements.txt pyproject.toml tools/setup.sh
	@tools/setup.sh
