"""Tell what is installed, what of it works, and the command that brings what is missing.

Exits with 1 if something that is installed does not work; what is merely not there is no fault.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec

from rich.console import Console

from .. import CONFIGS, __version__
from ..core.errors import EXTRAS, ONNX_SINCE
from ..report.provenance import ONEDL, UPSTREAM, git_revision, installed

OPENMMLAB = dict(
    zip(('mmengine.runner', 'mmcv.ops', 'mmdet.models', 'mmseg.models', 'mmpretrain.models'), zip(ONEDL, UPSTREAM))
)
"""Module that is imported -> its package in the maintained line and in the upstream one."""
TASKS = {'mmdet.models': 'detection', 'mmseg.models': 'segmentation', 'mmpretrain.models': 'classification'}
TOOLS = 'uv pip install "setuptools<82" wheel packaging ninja psutil'
BUILD = (
    'MMCV_WITH_OPS=1 uv pip install --no-build-isolation --reinstall-package {0} --refresh-package {0} '
    '--no-binary {0} "{1}"'
)
MMCV = {'onedl-mmcv': 'onedl-mmcv', 'mmcv': 'mmcv>=2.1.0,<2.2.0'}
"""Package -> what is asked for: mmdet 3.3.0 refuses a newer mmcv."""
USES = {
    'quantize, calibrate and train in plain torch': (),
    'packed files': ('safetensors',),
    'export to ONNX': ('onnx', 'onnx-ir', 'onnxscript'),
    'run and verify graphs in ONNX Runtime': ('onnx', 'onnxruntime'),
    'run and verify graphs in OpenVINO': ('onnx', 'openvino'),
    'compare records: tables': (),
    'compare records: HTML report': ('matplotlib', 'jinja2', 'pillow'),
}
"""What one can do without OpenMMLab -> the packages of EXTRAS that it needs."""

PROGRAM = """
import json, sys, warnings
from importlib import import_module
for name in sys.argv[1:]:
    print(json.dumps([name, None]), flush=True)
    said = ''
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always' if name.startswith('gdrq_mm') else 'ignore')
            module = import_module(name)
            if name.startswith('gdrq_mm'):
                module.operators()
        said = next((str(each.message) for each in caught), '')
    except Exception as error:
        said = f'{type(error).__name__}: {error}'
    print(json.dumps([name, said]), flush=True)
"""
KERNELS = 'gdrq_mm.core.kernels.native'


@dataclass
class Diagnosis:
    """What was found.

    Attributes:
        stack: 'onedl', 'upstream', 'mixture' or 'none'.
        packages: package -> its version; of OpenMMLab and of EXTRAS, those that are installed.
        failures: module -> what its import said, for those that failed; '' is one that ended the process.
        problems: what is broken, each with the command that mends it.
        kernels: why the torch code runs in place of the C++ kernels; '' where these run.
    """

    stack: str
    packages: dict[str, str]
    failures: dict[str, str]
    problems: list[tuple[str, str]]
    kernels: str


def diagnose() -> Diagnosis:
    """Look at what is installed, and import it in a process of its own, which a broken library may end."""
    names = [name for pair in OPENMMLAB.values() for name in pair]
    names += [name for packages in EXTRAS.values() for name in packages]
    packages = {name: number for name in ('torch', 'torchvision', *names) if (number := installed(name))}
    lines = [{pair[line] for pair in OPENMMLAB.values()} & packages.keys() for line in (0, 1)]
    stack = 'mixture' if all(lines) else 'onedl' if lines[0] else 'upstream' if lines[1] else 'none'
    modules = ['torch', *(['torchvision'] if 'torchvision' in packages else []), KERNELS]
    modules += [module for module in OPENMMLAB if stack != 'none' and find_spec(module.partition('.')[0])]
    modules += [module for extra in EXTRAS.values() for name, module in extra.items() if name in packages]
    said = _imports(modules)
    kernels = said.pop(KERNELS, '')
    failures = {name: text for name, text in said.items() if text != 'fine'}
    found = Diagnosis(stack, packages, failures, [], '' if kernels == 'fine' else kernels)
    found.problems = _problems(found)
    return found


def _imports(modules: list[str]) -> dict[str, str]:
    """Module -> 'fine', or what its import said. After one that ends the process the rest goes on in a new one."""
    said: dict[str, str] = {}
    while left := [name for name in modules if name not in said]:
        done = subprocess.run(
            [sys.executable, '-c', PROGRAM, *left], capture_output=True, text=True, env=_environment()
        )
        for line in done.stdout.splitlines():
            try:
                name, text = json.loads(line)
            except (ValueError, TypeError):
                continue  # a library printed something
            said[name] = f'its import ended the process ({done.returncode})' if text is None else text or 'fine'
        if left[0] not in said:
            return {**said, left[0]: (done.stderr.strip().splitlines() or ['python did not start'])[-1]}
    return said


def _environment() -> dict[str, str]:
    """That of this process, with the same folders to import from."""
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))}


def _problems(found: Diagnosis) -> list[tuple[str, str]]:
    """What does not work though it is installed, with the command that mends it."""
    problems = []
    upstream = [pair[1] for pair in OPENMMLAB.values() if pair[1] in found.packages]
    if found.stack == 'mixture':
        ours = [pair[0] for pair in OPENMMLAB.values() if pair[0] in found.packages]
        text = f'both lines of OpenMMLab are installed, which write the same files: {", ".join(ours + upstream)}'
        anew = f'uv pip install --reinstall --no-deps {" ".join(ours)}'
        problems.append((text, f'uv pip uninstall {" ".join(upstream)} && {anew}'))
    elif installed('mmcv-lite'):
        name = OPENMMLAB['mmcv.ops'][found.stack != 'onedl']
        problems.append(('mmcv-lite has no operators', f'uv pip uninstall mmcv-lite && {_build(name)}'))
    elif found.stack != 'none':
        line = found.stack == 'upstream'
        common, libraries = _names(found)
        missing = [name for name in common if name not in found.packages]
        if not found.packages.keys() & set(libraries):
            missing += libraries
        if missing:
            text = f'OpenMMLab ({found.stack}) is not whole: {", ".join(missing)} not installed'
            problems.append((text, f"uv pip install 'gdrq-mm[{found.stack}]'"))
    owners = {module: name for extra in EXTRAS.values() for name, module in extra.items()}
    line = found.stack == 'upstream'
    owners.update({module: pair[line] for module, pair in OPENMMLAB.items()})
    for module, text in found.failures.items():
        name = owners.get(module, module)
        mend = f'uv pip install --reinstall {name}'
        if 'mmcv._ext' in text:
            if module != 'mmcv.ops':
                continue  # it is told once
            text, mend = f'its operators were not built ({text})', _build(name)
        if 'MMCV==' in text and 'incompatible' in text:
            mend = _build(OPENMMLAB['mmcv.ops'][line])
        problems.append((f'{name} cannot be imported: {" ".join(text.split())[:300]}', mend))
    if _number(found.packages.get('torch', '0')) < (2, 1):
        problems.append(
            (f'torch {found.packages.get("torch", "is not installed")}: 2.1 is the oldest', 'uv pip install -U torch')
        )
    if _number(installed('transformers') or '0') >= (5,) and 'mmpretrain.models' in found.failures:
        problems.append(('mmpretrain does not work with transformers 5', 'uv pip install "transformers<5"'))
    return problems


def _build(name: str) -> str:
    """The command that brings mmcv with its operators."""
    return f'{TOOLS} && {BUILD.format(name, MMCV[name])}'


def _number(text: str) -> tuple[int, ...]:
    """A version to compare with, such as (2, 13)."""
    return tuple(int(part) for part in re.findall(r'\d+', text)[:2])


def abilities(found: Diagnosis) -> list[tuple[str, str, str]]:
    """What one can do: (what, what it lacks or '', the command that brings it or '')."""
    modules = {name: module for extra in EXTRAS.values() for name, module in extra.items()}
    extra_of = {name: extra for extra, packages in EXTRAS.items() for name in packages}
    rows = []
    for use, needs in USES.items():
        lacks = [name for name in needs if name not in found.packages or modules[name] in found.failures]
        mend = ' '.join(f"'gdrq-mm[{extra}]'" for extra in dict.fromkeys(extra_of[name] for name in lacks))
        if 'onnxscript' in needs and not lacks and _number(found.packages.get('torch', '0')) < ONNX_SINCE:
            rows.append((use, 'needs torch 2.8; the same checkpoint exports in an environment that has it', ''))
            continue
        rows.append((use, f'needs {", ".join(lacks)}' if lacks else '', f'uv pip install {mend}' if lacks else ''))
    use = 'train, test, infer, ...: '
    if found.stack == 'none':
        mend = f"{_build('onedl-mmcv')} && uv pip install 'gdrq-mm[onedl]'"
        return [*rows, (f'{use}configs of OpenMMLab', 'needs OpenMMLab', mend)]
    common, libraries = _names(found)
    engine, operators, *modules_of = OPENMMLAB
    whole = {*common} <= found.packages.keys() and not {engine, operators} & found.failures.keys()
    for library, module in zip(libraries, modules_of):
        if library not in found.packages and found.stack != 'mixture':
            rows.append((f'{use}{TASKS[module]}', f'needs {library}', f'uv pip install {library}'))
        else:
            works = whole and module not in found.failures and found.stack != 'mixture'
            rows.append((f'{use}{TASKS[module]}', '' if works else 'see below', ''))
    return rows


def _names(found: Diagnosis) -> tuple[list[str], list[str]]:
    """Packages of the line that is installed: what each task needs, and the library of each task."""
    names = [pair[found.stack == 'upstream'] for pair in OPENMMLAB.values()]
    return names[:2], names[2:]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    console = Console(highlight=False, soft_wrap=True, markup=False)
    with console.status('importing what is installed'):
        found = diagnose()
    revision = git_revision()
    commit = (
        f', commit {revision["commit"][:12]}{" and changes" * bool(revision["dirty"])}' if revision['commit'] else ''
    )
    console.print(f'gdrq_mm {__version__}{commit}, in {CONFIGS.parents[1]}')
    console.print(f'Python {platform.python_version()}, {platform.platform()}')
    console.print('kernels: C++' if not found.kernels else f'kernels: torch ({found.kernels})')
    console.print(f'OpenMMLab: {found.stack}')
    versions = ', '.join(f'{name} {number}' for name, number in found.packages.items())
    console.print(f'installed: {versions}\n')
    for what, lacks, mend in abilities(found):
        console.print(f'no   {what}: {lacks}' if lacks else f'yes  {what}')
        if mend:
            console.print(f'         {mend}')
    for text, mend in found.problems:
        console.print(f'\nbroken: {text}', style='red')
        console.print(f'         {mend}')
    if found.problems:
        sys.exit(1)
