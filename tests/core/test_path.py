"""How much a reader has to read from the config of GDRQ W4A4 to the arithmetic, counted by a real run."""

import ast
import sys
from pathlib import Path

import torch
import torch.nn as nn

import gdrq_mm.core
from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.kernels import native
from gdrq_mm.core.step import after_step
from tests.helpers import ROOT

CORE = Path(gdrq_mm.core.__file__).parent
OTHER_SUBJECTS = {
    'topology',
    'deployable',
    'integer_bias',
    'pyramid',
    'ranks',
    'calibrate',
    'modules',
    'prepare',
    'fused',
    'choice',
    'distill',
    'fixed_point',
    'compat',
    'attention',
    'products',
}
"""Modules of core/ that are not about what GDRQ computes: what feeds what, deployment, pyramid levels, processes,
the loop around calibration, finding modules in a model, distillation, steps that are powers of two, what older
torch lacks, attention, and where kernels compute the same at more speed."""
OTHER_FIELDS = ('Report.fields', 'Quantizer.Options.fields')
"""Those of the layer table, and of options that GDRQ replaces by its own."""
MOST = 800


def run_through():
    """From the dict of the config to training and evaluation, as a user's loop does it."""
    names: dict = {}
    exec((ROOT / 'configs/_base_/quantization/gdrq_w4a4.py').read_text(), names)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    x = torch.randn(2, 3, 8, 8)
    quantize_model(model, Quantization.from_dict(names['quantization']))
    calibrate(model, [x])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(x).square().mean().backward()
    optimizer.step()
    after_step(model)
    return model.eval()(x)


def codes_that_run(function):
    """The code objects of core/ that run while a function does."""
    found = set()

    def note(frame, event, argument):
        if event == 'call' and frame.f_code.co_filename.startswith(str(CORE)):
            found.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return found


def lines_of(file, codes):
    """Name -> lines to read: each function that ran, and the fields of settings, options and statistics."""
    starts = {code.co_firstlineno for code in codes}
    found = {}

    def first(node):
        return min([node.lineno, *(each.lineno for each in node.decorator_list)])

    def visit(node, name):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef) and first(child) in starts:
                found[f'{name}{child.name}'] = child.end_lineno - first(child) + 1
            elif isinstance(child, ast.ClassDef):
                visit(child, f'{name}{child.name}.')
        marks = [*getattr(node, 'decorator_list', ()), *getattr(node, 'bases', ())]
        if any(word in ast.unparse(each) for each in marks for word in ('dataclass', 'NamedTuple')):
            apart = [each for each in node.body if isinstance(each, (ast.FunctionDef, ast.ClassDef))]
            found[name + 'fields'] = node.end_lineno - first(node) + 1 - sum(e.end_lineno - first(e) + 1 for e in apart)

    visit(ast.parse(file.read_text()), '')
    return found


def test_from_config_to_arithmetic(monkeypatch):
    """Counted is each function of config, typed, convert, layers, quantizers, functional, kernels, step that runs.

    It counts once, with its docstring, and so do the fields of settings, options and statistics. What runs: validation
    of the dict, conversion of the model, calibration, a training step with its gradients, what moves after it, and an
    evaluation. Not counted are OTHER_SUBJECTS, OTHER_FIELDS, constants of modules, class attributes of torch modules
    (types of buffers), and what GDRQ W4A4 does not run: search, projection, freezing, other methods, error messages.
    """
    monkeypatch.setattr(native, 'operators', lambda: None)  # the reference is what one reads
    by_file: dict = {}
    for code in codes_that_run(run_through):
        by_file.setdefault(Path(code.co_filename), set()).add(code)
    total = 0
    for file, codes in sorted(by_file.items()):
        if file.stem in OTHER_SUBJECTS:
            continue
        found = lines_of(file, codes)
        found = {name: lines for name, lines in found.items() if not any(word in name for word in OTHER_FIELDS)}
        total += sum(found.values())
        print(f'{file.relative_to(CORE)}  {sum(found.values())}')
        for name, lines in found.items():
            print(f'    {lines:4} {name}')
    print(f'{total} lines in all')
    ran = {file.relative_to(CORE).as_posix() for file in by_file}
    assert {
        'config.py',
        'convert.py',
        'layers.py',
        'quantizers/gdrq.py',
        'functional.py',
        'kernels/reference.py',
    } <= ran
    assert not any('lsq' in file for file in ran), 'GDRQ is read without the other methods'
    assert total <= MOST
