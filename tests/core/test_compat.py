"""What older torch lacks: the stand-ins compute what torch does, and an export is refused in one line."""

import subprocess
import sys

import pytest
import torch

from gdrq_mm.core import compat
from tests.helpers import ENV

GATE = """
import sys
from gdrq_mm.core import compat
compat.EXPORTS = sys.argv[1] == 'True'
compat.torch.__version__ = '2.7.1+cpu'
try:
    compat.check_export()
    import gdrq_mm.deploy.export
    print('exports')
except compat.UserError as error:
    print(error)
"""


@pytest.mark.parametrize('exports', [True, False])
def test_an_export_says_which_torch_it_needs(exports):
    command = [sys.executable, '-c', GATE, str(exports)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert (
        line == 'exports' if exports else line.startswith('ONNX export needs torch 2.8 or newer, this is 2.7.1+cpu: ')
    )


@pytest.mark.parametrize(
    ('version', 'exports'),
    [('2.1.2+cpu', False), ('2.7.1', False), ('2.8.0a0+git1', True), ('2.13.0', True), ('3.0', True)],
)
def test_the_version_decides_not_its_text(version, exports):
    assert (compat.version_of(version) >= compat.ONNX_SINCE) == exports


def test_the_norm_is_that_of_torch():
    tensors = [torch.randn(3, 4), torch.tensor([1e3]), torch.zeros(0), torch.ones(2, dtype=torch.float64)]
    expected = torch.cat([t.flatten().double() for t in tensors]).norm()
    for norm in (compat.total_norm, compat._total_norm):
        torch.testing.assert_close(norm(tensors).double(), expected)
        assert norm([]) == 0
        assert not norm([*tensors, torch.tensor([1.0, float('nan')])]).isfinite()
        assert not norm([torch.tensor([float('inf')])]).isfinite()


def test_what_can_go_is_seen_here():
    """The oldest torch is 2.1. Where that moves, what newer torch has should not stand in compat.py any more."""
    for newer, there in (
        ((2, 3), hasattr(torch.compiler, 'is_compiling')),
        ((2, 4), hasattr(torch, 'get_autocast_dtype')),
        ((2, 6), hasattr(torch.nn.utils, 'get_total_norm')),
        ((2, 6), hasattr(torch.compiler, 'set_stance')),
        ((2, 8), hasattr(torch.onnx, 'ops')),
        ((2, 7), torch._C._GLIBCXX_USE_CXX11_ABI),
    ):
        assert there or newer > compat.TORCH, newer
    assert compat.compiler_flags() == ([] if torch._C._GLIBCXX_USE_CXX11_ABI else ['-D_GLIBCXX_USE_CXX11_ABI=0'])
