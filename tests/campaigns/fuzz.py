"""Feed damaged and crafted input to everything that reads a file or a command line.

    python -m tests.campaigns.fuzz --cases 100000

The law: what comes is a valid result or a UserError (for command lines also argparse's exit, or the point where the
model would be built). Any other exception fails, as does a run that needs more than MEMORY beyond what the program
has. Packed files are mutated as bytes, where the checksum must catch it, and in their header with the checksum made
anew.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import resource
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from mmengine.logging import HistoryBuffer

from gdrq_mm.core.config import Quantization
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.quantizers import ACTIVATION_METHODS, METHODS, WEIGHT_METHODS
from gdrq_mm.data import digits
from gdrq_mm.deploy.from_packed import load_packed
from gdrq_mm.deploy.merge import merge_model
from gdrq_mm.deploy.packed import read_packed, write_packed
from gdrq_mm.openmmlab import cli
from gdrq_mm.openmmlab.accumulation import accumulated
from gdrq_mm.openmmlab.checkpoints import iterations_of, read_checkpoint
from gdrq_mm.openmmlab.models import read_quantization
from gdrq_mm.openmmlab.weights import dataset_meta_of, load_weights, plan_of
from gdrq_mm.report.formats import comparison_csv, comparison_markdown, comparison_table
from gdrq_mm.report.html import html_report
from gdrq_mm.report.record import find_records
from tests.campaigns.report import FIGURES, report
from tests.deploy.builders import JSON, header_of, payload_of, prepared, summed, text_of
from tests.helpers import ROOT, Block, same
from tests.runs import COUNTS

MEMORY = 1 << 30
ODD = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 8, 255, 2**31, 2**40, 2**63, 10**30, 0.5, 4.0, 1e300),
    *(float('nan'), float('inf'), '', 'x', 'codes', 'int64', 'float32', 'gdrq', 'lsq', '*', '\udcff', 'a' * 999),
    *([], {}, [0], [1, 2], [2**20, 2**20], [0, 2**62], ['x'], [[1]], {'a': 1}, {'': None}, [2**62] * 70),
)
NESTED = json.loads('[' * 100 + ']' * 100)


def mutated(value, chance):
    """A copy of plain data with one to three places changed: replaced, removed, doubled or swapped."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        node, key = place(value, chance)
        if node is None:
            return odd(chance)
        change = chance.randrange(8)
        if change == 0:
            del node[key]
        elif change == 1 and isinstance(node, dict):
            node[chance.choice((f'{key}x', '', 'bits', 'method', 'weight'))] = copy.deepcopy(node[key])
        elif change == 2:
            node[key] = [node[key]] * chance.choice((1, 2, 50))
        elif change == 3 and isinstance(node[key], int):
            node[key] += chance.choice((-1, 1, 8, 2**20, -(2**40)))
        elif change == 4:
            other, name = place(value, chance)
            node[key] = copy.deepcopy(other[name]) if other is not None else None
        else:
            node[key] = odd(chance)
    return value


def odd(chance):
    """A value that is rarely the right one."""
    return copy.deepcopy(chance.choice((*ODD, NESTED)))


def place(value, chance):
    """A random container in nested data, and a key of it."""
    node, key = None, None
    while isinstance(value, (dict, list)) and value and (node is None or chance.random() < 0.8):
        node, key = value, chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
        value = node[key]
    return node, key


def damaged(content, chance):
    """Other bytes: flipped, cut, spliced, filled or exchanged."""
    data, change = bytearray(content), chance.randrange(6)
    a, b = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    if change == 0:
        for _ in range(chance.choice((1, 2, 20))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif change == 1:
        del data[a:]
    elif change == 2:
        del data[a:b]
    elif change == 3:
        data[a:a] = data[a:b]
    elif change == 4:
        data[a:b] = bytes([chance.choice((0, 255, 48))]) * (b - a)
    else:
        data[a : a + 8] = chance.randbytes(8)
    return bytes(data)


class Packed:
    """Cases of a packed file."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.path = folder / 'model.safetensors'
        settings = dict(weight=dict(bits=3, groups=2), activation=dict(bits=4), deployable=True)
        trained, plan = prepared(self.build(), *torch.rand(2, 4, 3, 9, 9), **settings)
        write_packed(merge_model(trained, plan), self.path, 'model = 1', dict(classes=['a', 'b']))
        self.content = self.path.read_bytes()
        self.header, self.payload = header_of(self.content), payload_of(self.content)

    @staticmethod
    def build():
        """The float model."""
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Block())

    def bytes(self, chance):
        """The checksum catches every change."""
        content = damaged(self.content, chance)
        self.path.write_bytes(content)
        read_packed(self.path)
        assert content == self.content, 'a change went unseen'

    def crafted(self, chance):
        """The checksum fits what was changed."""
        payload = self.payload if chance.random() < 0.8 else damaged(self.payload, chance)
        header = copy.deepcopy(self.header)
        if chance.random() < 0.7:  # safetensors refuses most of what is wrong elsewhere before we see it
            part = chance.choice(('layers', 'layers', *JSON))
            header['__metadata__'][part] = mutated(header['__metadata__'][part], chance)
        else:
            header = mutated(header, chance)
        header = text_of(header)
        if chance.random() < 0.1:
            header = damaged(header, chance)
        size = None if chance.random() < 0.9 else chance.choice((0, 1, len(header) - 1, 2**40, 2**64 - 1))
        self.path.write_bytes(summed(header, payload, size))
        found = read_packed(self.path)
        assert all(isinstance(tensor, torch.Tensor) for tensor in found.state.values())
        assert isinstance(found.meta, dict) and isinstance(found.config, str)

    def loaded(self, chance):
        """The same, into a model."""
        with contextlib.suppress(UserError):
            self.crafted(chance)
        load_packed(self.build(), self.path)


class Checkpoints:
    """Cases of a training checkpoint: all that such a file may hold, in torch's present format and in the old one."""

    SETTINGS = dict(weight=dict(bits=3, method='lsq'), activation=dict(bits=4), first_last_bits=4)

    def __init__(self, folder):
        self.path = folder / 'checkpoint.pth'
        self.model, plan = self.build()
        history = HistoryBuffer([0.5, 0.25], [1, 1])
        meta = dict(iter=3, epoch=1, seed=0, experiment_name='x', dataset_meta=dict(classes=('a',), palette=np.eye(3)))
        meta |= dict(quantization=self.SETTINGS, plan=plan.to_dict(), config='model = 1', start=None, run='abc')
        meta |= dict(recipe=dict(batch_size=16), validated=True, accumulated=accumulated(self.model))
        hub = dict(log_scalars={'train/loss': history}, runtime_info=dict(iter=3, lr=np.float64(0.1)), resumed_keys={})
        optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9).state_dict()
        self.whole = dict(meta=meta, state_dict=self.model.state_dict(), message_hub=hub, optimizer=optimizer)
        self.saved = []
        for new_format in (True, False):
            torch.save(self.whole, self.path, _use_new_zipfile_serialization=new_format)
            self.saved.append(self.path.read_bytes())
        with zipfile.ZipFile(io.BytesIO(self.saved[0])) as archive:
            self.parts = {name: archive.read(name) for name in archive.namelist()}

    @staticmethod
    def build():
        """A small quantized model and its plan."""
        torch.manual_seed(0)
        settings = {key: value for key, value in Checkpoints.SETTINGS.items() if key != 'first_last_bits'}
        return prepared(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), *torch.rand(2, 4, 3, 9, 9), **settings)

    def bytes(self, chance):
        """The checksums catch every change but those of the padding."""
        content = damaged(self.saved[0], chance)
        self.path.write_bytes(content)
        found = read_checkpoint(str(self.path))
        assert same(found['state_dict'], self.whole['state_dict']), 'a change went unseen'

    def crafted(self, chance):
        """The checksums fit what was changed: the pickle, a tensor or the old format, which has none."""
        if chance.random() < 0.3:
            self.path.write_bytes(damaged(self.saved[1], chance))
        else:
            name = chance.choice([n for n in self.parts if 'data' in n] + ['archive/data.pkl', 'archive/data.pkl'])
            name = next(n for n in self.parts if n.endswith(name.removeprefix('archive')))
            with zipfile.ZipFile(self.path, 'w', chance.choice((0, 0, 0, zipfile.ZIP_DEFLATED))) as archive:
                for each, content in self.parts.items():
                    archive.writestr(each, damaged(content, chance) if each == name else content)
        self.use(read_checkpoint(str(self.path)), chance)

    def changed(self, chance):
        """Whole files whose data are not what they have to be."""
        whole = {**self.whole, 'state_dict': dict(self.whole['state_dict'])}
        part = chance.choice(list(whole))
        if part == 'state_dict' and chance.random() < 0.8:
            name = chance.choice(list(whole[part]))
            value = whole[part][name]
            whole[part][name] = chance.choice(
                (odd(chance), value[..., None], value.double(), torch.full_like(value, 9), np.zeros(3), value[None][:0])
            )
        elif part == 'meta':
            whole[part] = mutated(whole[part], chance)
        else:
            whole[part] = odd(chance)
        if chance.random() < 0.1:
            del whole[chance.choice(list(whole))]
        torch.save(whole, self.path)
        self.use(read_checkpoint(str(self.path)), chance)

    def use(self, checkpoint, chance):
        """Into the model, as a test, a resumed and a new training do it."""
        iterations_of(checkpoint)
        plan_of(self.model, checkpoint, 'x.pth')
        dataset_meta_of(checkpoint, 'x.pth')
        use = chance.choice(('test', 'resume', 'start'))
        share = chance.choice((0.0, 0.5, 1.0))
        load_weights(copy.deepcopy(self.model), checkpoint, 'x.pth', self.SETTINGS, share, use)


class Records:
    """Cases of run records: one file in two is that of the float model, as a comparison has them."""

    def __init__(self, folder):
        self.folder = folder / 'records'
        self.folder.mkdir()
        self.texts = [path.read_text() for path in sorted((ROOT / 'docs/records').glob('*_bccd.json'))]

    def one(self, chance):
        texts = list(self.texts)
        changed = chance.randrange(len(texts))
        if chance.random() < 0.2:
            texts[changed] = damaged(texts[changed].encode(), chance)
        else:
            texts[changed] = json.dumps(mutated(json.loads(texts[changed]), chance)).encode()
        for number, text in enumerate(texts):
            path = self.folder / f'{number}.json'
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        records = find_records([self.folder])
        for use in (comparison_table, comparison_markdown, comparison_csv):
            use(records)
        if chance.random() < 0.02:
            html_report(records, [self.folder])


BASE = dict(
    method='gdrq',
    weight=dict(bits=4, groups=4, method='gdrq', gdrq=dict(k=3.5, clip='project', threshold='search'), lsq=dict()),
    activation=dict(bits=4, range='auto', per_level=False, method='gdrq', gdrq=dict(k=None, momentum=0.01)),
    first_last_bits=8,
    deployable=True,
    schedule=dict(reshape=0.3, freeze=0.9),
    calibration_batches=8,
    skip=['backbone.layer4.*'],
    overrides={'*.conv2': dict(weight=dict(bits=8)), 'head': dict(activation=dict(bits=2, method='lsq'))},
)


def settings(chance):
    """A quantization dict, and what layers get from it."""
    cfg = copy.deepcopy(BASE)
    for side, methods in (('weight', WEIGHT_METHODS), ('activation', ACTIVATION_METHODS)):
        cfg[side]['method'] = chance.choice(list(methods))
        cfg[side][cfg[side]['method']] = {
            name: odd(chance) for name in methods[cfg[side]['method']].Options.__dataclass_fields__
        }
        if chance.random() < 0.8:
            del cfg[side][cfg[side]['method']]
    cfg['method'] = chance.choice(list(METHODS))
    cfg = mutated(cfg, chance)
    if isinstance(cfg, dict) and chance.random() < 0.1:
        cfg[chance.choice((1, None, (1, 2), 0.5))] = 1
    found = Quantization.from_dict(cfg)
    for name in ('backbone.conv1', 'backbone.layer1.0.conv2', 'head'):
        found.for_layer(name, chance.random() < 0.5)
    found.choices()


class Reached(Exception):
    """The command line was accepted."""


class Commands:
    """Cases of command lines, as far as the point where a model is built."""

    CONFIG = ROOT / 'configs/cls/resnet18_width16_gdrq_w4a4_digits.py'
    TOOLS = {
        'train': (1, ['--amp', '--auto-scale-lr', '--no-validate', '--unsafe-load'], ['--resume', '--work-dir']),
        'test': (2, ['--show', '--tta'], ['--out', '--show-dir', '--wait-time', '--record', '--backend', '--exported']),
        'calibrate': (2, ['--unsafe-load'], ['--out', '--work-dir', '--launcher']),
        'export': (2, ['--unsafe-load'], ['--out', '--format', '--image']),
        'infer': (3, [], ['--out', '--score-thr', '--device']),
        'analyze': (2, ['--no-metric'], ['--out', '--reference', '--samples', '--layers', '--float-checkpoint']),
        'compare': (2, [], ['--markdown', '--csv', '--html']),
        'sweep': (1, ['--list'], ['--jobs', '--cores', '--only', '--slurm', '--slurm-args']),
        'data': (1, [], ['--source', '--out']),
    }
    """Name -> positional arguments, options, options with a value."""
    OPTIONS = (
        *('quantization.weight.bits=9', 'quantization=[]', 'quantization.skip=5', 'model=None', 'model=3', 'model=[]'),
        *('train_dataloader=5', 'train_dataloader.dataset=5', 'train_dataloader.dataset=None', 'test_dataloader=[1]'),
        *('optim_wrapper=7', 'optim_wrapper=None', 'default_hooks=None', 'default_hooks.checkpoint=3', 'work_dir=4'),
        *(
            'default_hooks.checkpoint.out_dir=4',
            'train_dataloader.dataset.data_root=7',
            'default_scope=[]',
            '=',
            'a==b',
        ),
        *('a', 'a.=1', '.=1', 'train_cfg=3', 'load_from=5', 'val_dataloader={', 'x=[1,2', 'x=(1,(2,3))', 'x="[1"'),
        *('runner_type=5', 'auto_scale_lr=3', 'log_level=9', 'test_evaluator=4', 'train_cfg.max_epochs=x', 'é=\udcff'),
        *('test_dataloader.dataset.pipeline=3', 'train_dataloader.dataset.datasets=3', 'visualizer=1'),
    )

    def __init__(self, folder):
        self.folder = folder / 'home'
        self.folder.mkdir()
        with self.few_digits():
            digits.build(self.folder / 'data/digits', show_progress=False)
        (self.folder / 'binary').write_bytes(os.urandom(99))
        (self.folder / 'odd.py').write_text('model = dict(type=1)\nquantization = 3\n')
        (self.folder / 'broken.py').write_text('_base_ = 5\nmodel = [')
        (self.folder / 'folder').mkdir()
        self.tools = {name: import_module(f'gdrq_mm.commands.{name}') for name in self.TOOLS}

    @staticmethod
    @contextlib.contextmanager
    def few_digits():
        before, digits.COUNTS = digits.COUNTS, COUNTS
        try:
            yield
        finally:
            digits.COUNTS = before

    @staticmethod
    def reach(cfg, *args, **kwargs):
        if hasattr(cfg, 'filename'):
            read_quantization(cfg)
        raise Reached

    def line(self, name, chance):
        values = (*('', '0', '-1', '3', 'x', 'x.png', 'x.pkl', 'binary', 'folder', 'odd.py', 'broken.py', 'none.py'),)
        values += ('1e400', 'nan', 'auto', '/proc/x', 'onnxruntime', 'none', 'slurm', '--', '\udcff', 'digits')
        number, flags, valued = self.TOOLS[name]
        words = [chance.choice(values) for _ in range(number)]
        if chance.random() < 0.8 and name not in ('compare', 'sweep', 'data'):
            words[0] = str(self.CONFIG)
        if chance.random() < 0.1:
            words.append(chance.choice((*values, '--nonsense')))
        words += chance.sample(flags, chance.randrange(len(flags) + 1))
        for option in chance.sample(valued, chance.randrange(len(valued) + 1)):
            words += [option, chance.choice(values)]
        if name in ('export', 'infer') and chance.random() < 0.9:
            words += ['--out', 'new.png']
        if chance.random() < 0.6:
            words += ['--cfg-options', *chance.sample(self.OPTIONS, chance.choice((1, 1, 2)))]
        return words

    def one(self, chance):
        name = chance.choice(list(self.TOOLS))
        tool = self.tools[name]
        words = self.line(name, chance)
        before = os.getcwd(), sys.argv, dict(os.environ), sys.excepthook
        names = vars(tool)
        kept = {key: names[key] for key in names.keys() & {'build_runner', 'init_model', 'run_all'}}
        names.update(dict.fromkeys(kept, self.reach))
        os.chdir(self.folder)
        sys.argv = [name, *words]
        unexpected = []  # what a tool would show the traceback of
        sys.excepthook = lambda kind, error, trace: unexpected.append(error)
        try:
            out, err = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
            with out, err, self.few_digits():
                end = cli.ending(tool.main)
            if unexpected:
                raise unexpected[0]
            assert end == 0 or str(end).startswith('error: '), end
            if end:
                raise UserError(end)
        except SystemExit as refused:  # argparse
            assert refused.code in (0, 2), refused.code
            raise UserError('usage') from None
        except Reached:
            pass
        except Exception as error:
            error.add_note(f'{name} {words}')
            raise
        finally:
            names.update(kept)
            os.chdir(before[0])
            sys.argv, sys.excepthook = before[1], before[3]
            os.environ.clear()
            os.environ.update(before[2])


def attack(name, case, number, seed):
    """Counts of one kind of input, and the crashes: one of each place in the code."""
    found, crashes = Counter(), {}
    for index in range(number):
        try:
            case(random.Random(f'{seed} {name} {index}'))
            found['valid'] += 1
        except UserError:
            found['refused'] += 1
        except Exception as error:
            found['crashed'] += 1
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f'{name}: {type(error).__name__} in {frame.name}, {Path(frame.filename).name}:{frame.lineno}'
            notes = ' '.join(getattr(error, '__notes__', ()))
            crashes.setdefault(where, f'{where}, case {index}: {str(error)[:100]} {notes}')
    print(name, dict(found), flush=True)
    return found, list(crashes.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', type=int, default=100_000, help='packed files and checkpoints; others have less')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', default='')
    parser.add_argument('--out', type=Path, default=FIGURES / 'fuzz.json')
    args = parser.parse_args()
    rows, failures = {}, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        packed, records, commands = Packed(folder), Records(folder), Commands(folder)
        checkpoints = Checkpoints(folder)
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        kinds = {
            'packed files, bytes': (packed.bytes, args.cases // 4),
            'packed files, header': (packed.crafted, args.cases * 3 // 4),
            'packed files, into a model': (packed.loaded, args.cases // 50),
            'checkpoints, bytes': (checkpoints.bytes, args.cases // 4),
            'checkpoints, crafted': (checkpoints.crafted, args.cases // 2),
            'checkpoints, other data': (checkpoints.changed, args.cases // 4),
            'run records': (records.one, args.cases // 20),
            'quantization dicts': (settings, args.cases // 2),
            'command lines': (commands.one, args.cases // 50),
        }
        for name, (case, number) in kinds.items():
            if args.only in name:
                found, crashes = attack(name, case, number, args.seed)
                rows |= {f'{name}: {what}': found[what] for what in ('valid', 'refused', 'crashed')}
                failures += crashes
    report(args.out, rows, failures, seed=args.seed)


if __name__ == '__main__':
    main()
