# The float model of the grid (benchmarks/grid.py): half an hour on one core instead of four.
_base_ = ['../_base_/models/resnet18_w16.py', '../_base_/schedules/cifar10_30e.py']
