# make quickstart   set up .venv if needed, then train, quantize and compare on the embedded data
# make test         set up .venv if needed, then lint and run the tests
# make lint         ruff and mypy
# make campaigns    kill training at random moments, feed crafted input, watch memory: about half an hour
# make benchmark    train and test the small-scale grid (hours; goes on where it stopped), write the tables anew
PY := .venv/bin/python

.PHONY: quickstart test lint setup benchmark campaigns
quickstart: .venv/.ready
	@echo "Training float models of three tasks and their 4-bit versions on the embedded data: about 13 minutes on 2 cores."
	@$(PY) tools/quickstart.py

test: lint
	@echo "Running the tests: about 12 minutes on 2 cores."
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal

lint: .venv/.ready
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy gdrq_mm

campaigns: .venv/.ready
	@OMP_NUM_THREADS=1 $(PY) -m tests.campaigns.kill
	@OMP_NUM_THREADS=1 $(PY) -m tests.campaigns.fuzz
	@OMP_NUM_THREADS=1 $(PY) -m tests.campaigns.memory

FLOATS := work_dirs/resnet18_w16_cifar10/epoch_180.pth work_dirs/yolox_nano_digits/epoch_20.pth \
    work_dirs/pspnet_r18_digits/epoch_20.pth

benchmark: .venv/.ready $(FLOATS)
	@$(PY) tools/sweep.py benchmarks/grid.py --jobs $(shell nproc)
	@$(PY) benchmarks/tables.py

work_dirs/resnet18_w16_cifar10/epoch_180.pth:
	@echo "Training the float model on CIFAR-10: about 4 hours on one core."
	@OMP_NUM_THREADS=1 $(PY) tools/train.py configs/cls/resnet18_w16_cifar10.py --amp --resume

work_dirs/yolox_nano_digits/epoch_20.pth:
	@$(PY) tools/prepare_data.py digits
	@$(PY) tools/train.py configs/det/yolox_nano_digits.py --resume

work_dirs/pspnet_r18_digits/epoch_20.pth:
	@$(PY) tools/prepare_data.py digits
	@$(PY) tools/train.py configs/seg/pspnet_r18_digits.py --resume

setup: .venv/.ready

.venv/.ready: requirements.txt pyproject.toml tools/setup.sh
	@tools/setup.sh
