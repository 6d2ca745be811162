# make quickstart   set up .venv if needed, then train, quantize and compare on the embedded data
# make test         set up .venv if needed, then lint and run the tests
# make lint         ruff and mypy
PY := .venv/bin/python

.PHONY: quickstart test lint setup
quickstart: .venv/.ready
	@echo "Training float models of three tasks and their 4-bit versions on the embedded data: about 13 minutes on 2 cores."
	@$(PY) tools/quickstart.py

test: lint
	@echo "Running the tests: about 8 minutes on 2 cores."
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal

lint: .venv/.ready
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy gdrq_mm

setup: .venv/.ready

.venv/.ready: requirements.txt pyproject.toml tools/setup.sh
	@tools/setup.sh
