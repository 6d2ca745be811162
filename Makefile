# make quickstart   set up .venv if needed, then train, quantize and compare on the embedded data
# make test         set up .venv if needed, then lint and run the tests
# make lint         ruff and mypy
# make benchmark    train and test the small-scale grid (hours; goes on where it stopped), write the tables anew
PY := .venv/bin/python

.PHONY: quickstart test lint setup benchmark
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

FLOATS := work_dirs/resnet18_w16_24e_cifar10/epoch_24.pth work_dirs/vgg11_bn_8e_cifar10/epoch_8.pth \
    work_dirs/yolox_nano_digits/epoch_20.pth work_dirs/pspnet_r18_digits/epoch_20.pth

benchmark: .venv/.ready data/digits $(FLOATS)
	@$(PY) tools/sweep.py benchmarks/grid.py --jobs $(shell nproc)
	@$(PY) benchmarks/tables.py

data/digits:
	@$(PY) tools/prepare_data.py digits

work_dirs/resnet18_w16_24e_cifar10/epoch_24.pth work_dirs/vgg11_bn_8e_cifar10/epoch_8.pth:
	@echo "Training the float model $(word 2,$(subst /, ,$@)): about half an hour on one core."
	@OMP_NUM_THREADS=1 $(PY) tools/train.py configs/cls/$(word 2,$(subst /, ,$@)).py --amp --resume

work_dirs/yolox_nano_digits/epoch_20.pth:
	@$(PY) tools/train.py configs/det/yolox_nano_digits.py --resume

work_dirs/pspnet_r18_digits/epoch_20.pth:
	@$(PY) tools/train.py configs/seg/pspnet_r18_digits.py --resume

setup: .venv/.ready

.venv/.ready: requirements.txt pyproject.toml tools/setup.sh
	@tools/setup.sh
