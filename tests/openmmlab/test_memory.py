"""Tools keep the memory that tensors free: what glibc would give back to the system and take anew at every step."""

import ctypes
import subprocess
import sys

import pytest

from tests.helpers import ROOT

PAGES = 64 * 2**20 // 4096
"""Of a tensor of 64 MiB."""
FAULTS = """
import resource, sys, torch
from gdrq_mm.openmmlab.cli import main

def command():
    for i in range(30):
        if i == 20:  # by then the heap has grown to what fits; with torch 2.1 that took up to eight tensors
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

main(command)
"""


def faults(**variables):
    """Pages that the system gave for the last ten of thirty tensors of 64 MiB, one after the other."""
    command = [sys.executable, '-c', FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'mallopt'), reason='not glibc')
def test_tensors_take_the_memory_of_freed_ones_unless_the_environment_says_otherwise():
    assert faults() < PAGES
    assert faults(MALLOC_TRIM_THRESHOLD_='131072') > 8 * PAGES
