# make quickstart   set up .venv if needed, then train, quantize and compare on the embedded data
# make check        set up .venv if needed, then test the arithmetic alone, from fake quantization to integers, without OpenMMLab
# make test         set up .venv if needed, then lint and run all tests; the log ends with the slowest
# make test-full    the same and what takes longer: full-scale configs, every method in every task, the benchmarks
# make test-upstream  train, test, infer and pack with OpenMMLab's own packages, torch 2.1 and Python 3.10: .venv-upstream
# make test-slurm   train, preempt and test a detector on a slurm that is started for it (packages slurm-wlm and munge)
# make lint         ruff and mypy
# make docs         the site of the documentation, in build/site; a dead link or a missing docstring fails
# make campaigns    kill training at random moments, feed crafted files and input, watch memory: an hour
# make benchmark    train and test the small-scale grid (hours; goes on where it stopped), write the tables anew
#
# PYTHON=python3.12 make test   the same with another Python, in an environment of its own: .venv-python3.12
VENV := $(if $(PYTHON),.venv-$(notdir $(PYTHON)),.venv)
PY := $(VENV)/bin/python

.PHONY: quickstart check test test-full test-upstream test-slurm lint docs setup benchmark campaigns
quickstart: $(VENV)/.ready
	@echo "Training float models of three tasks and their 4-bit versions on the embedded data: 7 to 10 minutes on 2 cores."
	@$(PY) tools/quickstart.py

check: $(VENV)/.ready
	@echo "Testing the arithmetic, quantizers, layers and integers: about a minute on 2 cores."
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal tests/core tests/deploy/test_merge.py tests/deploy/test_packed.py

test: lint
	@echo "Running the tests: 15 to 20 minutes on 2 cores."
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal --durations=25

test-full: lint
	@echo "Running all tests, those that take long too: about 20 minutes on 2 cores."
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal --durations=25 -m "full or not full"

test-upstream: .venv-upstream/.ready
	@echo "Running the tests with OpenMMLab's own packages: about 20 minutes on 2 cores. What needs newer torch is skipped."
	@OMP_NUM_THREADS=1 .venv-upstream/bin/python -m pytest -n auto --dist worksteal --durations=25 -rs

test-slurm: $(VENV)/.ready
	@echo "Running jobs on a slurm of two nodes on this machine: up to 10 minutes on 2 cores."
	@OMP_NUM_THREADS=1 $(PY) -m pytest -o faulthandler_exit_on_timeout=false tests/slurm

lint: $(VENV)/.ready
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy gdrq_mm

docs: $(VENV)/.ready
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "Open build/site/index.html."

campaigns: $(VENV)/.ready
	@OMP_NUM_THREADS=1 $(PY) -m tests.campaigns.kill
	@OMP_NUM_THREADS=1 $(PY) -m tests.campaigns.doors
	@OMP_NUM_THREADS=1 $(PY) -m tests.campaigns.fuzz
	@OMP_NUM_THREADS=1 $(PY) -m tests.campaigns.memory

FLOATS := work_dirs/resnet18_width16_12e_cifar10/epoch_12.pth work_dirs/vgg11_bn_digits/epoch_4.pth \
    work_dirs/yolox_nano_digits/epoch_20.pth work_dirs/pspnet_r18_digits/epoch_20.pth

benchmark: $(VENV)/.ready data/digits $(FLOATS)
	@for sweep in grid references ablation; do $(PY) tools/sweep.py benchmarks/$$sweep.py --jobs $(shell nproc) || exit 1; done
	@$(PY) benchmarks/tables.py

data/digits:
	@$(PY) tools/prepare_data.py digits

work_dirs/resnet18_width16_12e_cifar10/epoch_12.pth: ARGS := configs/cls/resnet18_width16_12e_cifar10.py --amp
work_dirs/vgg11_bn_digits/epoch_4.pth: ARGS := configs/cls/vgg11_bn_digits.py
work_dirs/yolox_nano_digits/epoch_20.pth: ARGS := configs/det/yolox_nano_digits.py
work_dirs/pspnet_r18_digits/epoch_20.pth: ARGS := configs/seg/pspnet_r18_digits.py
$(FLOATS):
	@echo "Training a float model of the grid: $(ARGS) (3 to 30 minutes)"
	@$(PY) tools/train.py $(ARGS) --resume

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt pyproject.toml tools/setup.sh
	@VENV=$(VENV) tools/setup.sh

.venv-upstream/.ready: requirements-upstream.txt pyproject.toml tools/setup.sh
	@STACK=upstream tools/setup.sh
