"""Bring crafted files to every door: each option and config key that names a file.

    python -m tests.campaigns.doors

The law: nothing in a file runs; the file is used as data, or refused in one line; no more than MEMORY is needed.
"""

import argparse
import contextlib
import itertools
import os
import pickle
import resource
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope

import gdrq_mm
from gdrq_mm.core.errors import UserError
from gdrq_mm.data import cifar10, digits
from gdrq_mm.openmmlab import analysis
from gdrq_mm.openmmlab.apis import init_model
from gdrq_mm.openmmlab.checkpoints import find_resumable, read_checkpoint
from gdrq_mm.openmmlab.cli import build_runner
from gdrq_mm.openmmlab.data_only import data_only
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.campaigns.report import FIGURES, report
from tests.crafted import ARRAYS, LARGE, MEMO, Call, deflated, mark, object_array, of_numpy_1, overlapping, two_tables
from tests.helpers import ROOT
from tests.runs import COUNTS, tiny_config

MEMORY = 2 << 30
EXECUTED = 'executed'


def training(base, **changes):
    """A whole training checkpoint with something else in it."""
    return {**read_checkpoint(base), **changes}


def with_meta(base, **meta):
    content = training(base)
    return {**content, 'meta': {**content['meta'], **meta}}


def hidden(evil):
    """A history with an attribute."""
    found = HistoryBuffer([0.5], [1])
    found.note = evil
    return found


COMMAND = f"import os\nos.system('mkdir {EXECUTED}')\n"
CHECKPOINTS = {
    'code': lambda path, base: torch.save(training(base, more=mark(EXECUTED)), path),
    'code alone': lambda path, base: torch.save(mark(EXECUTED), path),
    'code in the format of before torch 1.6': lambda path, base: torch.save(
        training(base, more=mark(EXECUTED)), path, _use_new_zipfile_serialization=False
    ),
    'code in a pickle': lambda path, base: path.write_bytes(pickle.dumps(training(base, more=mark(EXECUTED)))),
    'code in a history': lambda path, base: torch.save(
        training(base, message_hub=dict(log_scalars={'loss': hidden(mark(EXECUTED))})), path
    ),
    'code as the text of the config': lambda path, base: torch.save(with_meta(base, config=COMMAND, cfg=COMMAND), path),
    'another getattr': lambda path, base: torch.save(training(base, more=Call(getattr, HistoryBuffer, 'data')), path),
    'deflated': lambda path, base: deflated(path, 1 << 28),
    'overlapping parts': lambda path, base: overlapping(path, 100),
    'two tables of contents': lambda path, base: two_tables(path),
    'empty': lambda path, base: path.write_bytes(b''),
    'a text': lambda path, base: path.write_text(COMMAND),
    'half': lambda path, base: path.write_bytes(Path(base).read_bytes()[:9000]),
    **{f'array: {k}': lambda path, base, v=v: torch.save(with_meta(base, more=v), path) for k, v in ARRAYS.items()},
    **{k: lambda path, base, v=v: torch.save(with_meta(base, more=v), path) for k, v in LARGE.items()},
}
"""Kind -> writes a file, given a genuine training checkpoint."""


def of_numpy(path, base):
    path.write_bytes(Path(base).read_bytes())
    of_numpy_1(path)


GENUINE = {
    'genuine': lambda path, base: path.write_bytes(Path(base).read_bytes()),
    'of NumPy 1': of_numpy,
}
YAML = f'!!python/object/apply:os.mkdir [{EXECUTED}]\n'
PICKLES = {
    **{
        f'code, protocol {p}': lambda path, base, p=p: path.write_bytes(pickle.dumps({'a': mark(EXECUTED)}, p))
        for p in range(6)
    },
    'values numbered high': lambda path, base: path.write_bytes(MEMO),
    'an array of objects': lambda path, base: path.write_bytes(object_array(mark(EXECUTED))),
    'YAML': lambda path, base: path.write_text(YAML),
    'empty': lambda path, base: path.write_bytes(b''),
    **{f'array: {k}': lambda path, base, v=v: path.write_bytes(pickle.dumps(v, 2)) for k, v in ARRAYS.items()},
    **{k: lambda path, base, v=v: path.write_bytes(pickle.dumps(v, 2)) for k, v in LARGE.items() if 'tensor' not in k},
}
"""Kind -> writes a data file."""


class Home:
    """What the doors share: small data, a genuine checkpoint, a runner to build data loaders with."""

    def __init__(self, folder, data=None, checkpoint=None):
        self.folder = Path(folder)
        if data is None:
            digits.COUNTS = COUNTS
            data = digits.build(self.folder / 'digits', show_progress=False)
        self.data = data
        if checkpoint is None:
            runner = QuantRunner.from_cfg(tiny_config(self.data, self.folder / 'base', None, 1))
            runner.train()
            checkpoint = str(self.folder / 'base/epoch_1.pth')
        self.checkpoint = checkpoint
        self.runner = QuantRunner.from_cfg(self.config())
        self.number = itertools.count()

    def config(self, **changes):
        return tiny_config(self.data, self.folder / 'run', None, 1, **{'val_cfg': None, **changes, **NO_VAL})


NO_VAL = dict(val_cfg=None, val_dataloader=None, val_evaluator=None)
MODEL = ROOT / 'configs/cls/resnet18_width16_digits.py'
SMALL = {'model.backbone.stem_channels': 4, 'model.backbone.base_channels': 4, 'model.head.in_channels': 32}


def start(home, path):
    QuantRunner.from_cfg(home.config(load_from=str(path))).load_or_resume()


def resume(home, path):
    QuantRunner.from_cfg(home.config(load_from=str(path), resume=True)).train()


def resume_auto(home, path):
    folder = home.folder / f'auto{next(home.number)}'
    folder.mkdir()
    (folder / 'last_checkpoint').write_text(str(path))
    found, _ = find_resumable(folder)
    resume(home, found)


def other_runner(home, path):
    cfg = home.config(load_from=str(path), resume=True, runner_type='Runner')
    build_runner(cfg, argparse.Namespace(unsafe_load=False)).train()


def pretrained(home, path):
    init = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    QuantRunner.from_cfg(home.config(**{'model.backbone.init_cfg': init})).train()


def calibrated(home, path):
    cfg = tiny_config(home.data, home.folder / 'run', epochs=1, load_from=str(path), **NO_VAL)
    QuantRunner.from_cfg(cfg).load_calibrated()


def analyzed(home, path):
    analysis.prepare(tiny_config(home.data, home.folder / 'run', epochs=1), str(path))


def teacher(home, path):
    """mmdet's detectors with a teacher, such as LD, load it in their constructor."""
    base = Config.fromfile(ROOT / 'configs/det/yolox_nano_digits.py')
    parts = {key: base.model[key] for key in ('backbone', 'neck', 'bbox_head', 'train_cfg', 'test_cfg')}
    cfg = base.copy()
    cfg.model = dict(
        type='KnowledgeDistillationSingleStageDetector',
        teacher_config=dict(model=base.model.to_dict()),
        teacher_ckpt=str(path),
        **parts,
    )
    cfg.pop('memory_format', None)
    try:
        init_model(cfg)
    finally:
        init_default_scope('mmpretrain')


def dataset(kind, **settings):
    def door(home, path):
        given = {key: str(path) if value is None else value for key, value in settings.items()}
        cfg = dict(type=kind, pipeline=[], **given)
        sampler = dict(type='DefaultSampler', shuffle=False)
        home.runner.build_dataloader(dict(dataset=cfg, batch_size=1, num_workers=0, sampler=sampler))

    return door


def proposals(home, path):
    root = home.data / 'scenes'
    settings = dict(data_root=str(root), ann_file='annotations/train.json', data_prefix=dict(img='train/images'))
    settings['metainfo'] = dict(classes=tuple('0123456789'))
    dataset('mmdet.CocoDataset', proposal_file=None, **settings)(home, path.absolute())


def class_weight(home, path):
    with data_only():
        MODELS.build(dict(type='mmseg.CrossEntropyLoss', class_weight=str(path)))


def hierarchy(home, path):
    from mmdet.datasets import OpenImagesDataset

    with data_only():
        OpenImagesDataset._get_relation_matrix(SimpleNamespace(backend_args=None), str(path))


def biomedical(home, path):
    with data_only():
        transform = TRANSFORMS.build(dict(type='mmseg.LoadBiomedicalData', decode_backend='pickle'))
        transform(dict(img_path=str(path)))


def queue(home, path):
    """What a hook of mmpretrain does with its `queue_path`."""
    with data_only():
        torch.load(str(path))


def batch(home, path):
    list(cifar10._official('data_batch_1', path.read_bytes(), str(path)))


DOORS = {
    'checkpoint of a tool': ('pth', lambda home, path: read_checkpoint(str(path))),
    'load_from': ('pth', start),
    '--resume': ('pth', resume),
    '--resume auto': ('pth', resume_auto),
    'runner_type': ('pth', other_runner),
    'tools/calibrate.py': ('pth', calibrated),
    'tools/analyze.py': ('pth', analyzed),
    'init_model': ('pth', lambda home, path: init_model(MODEL, path, 'cpu', SMALL)),
    'init_cfg': ('pth', pretrained),
    'teacher_ckpt': ('pth', teacher),
    'queue_path': ('pth', queue),
    'gdrq_mm.load': ('pth', lambda home, path: gdrq_mm.load(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), path)),
    'ann_file of BaseDetDataset': ('pkl', dataset('mmdet.BaseDetDataset', ann_file=None)),
    'ann_file of MultiLabelDataset': ('pkl', dataset('mmpretrain.MultiLabelDataset', ann_file=None)),
    'ann_file, YAML': ('yml', dataset('mmpretrain.MultiLabelDataset', ann_file=None)),
    'ann_file, JSON': ('json', dataset('mmpretrain.MultiLabelDataset', ann_file=None)),
    'proposal_file': ('pkl', proposals),
    'class_weight': ('pkl', class_weight),
    'class_weight, YAML': ('yml', class_weight),
    'class_weight, NumPy': ('npy', class_weight),
    'hierarchy_file': ('npy', hierarchy),
    'decode_backend': ('pkl', biomedical),
    'tools/prepare_data.py cifar10': ('pkl', batch),
}
"""Option or config key -> suffix of the file, and what reads it."""
# Data sets of any library meet nonsense where they expect a dict; what they raise is not the matter here.
MEETS_NONSENSE = (TypeError, KeyError, AssertionError, AttributeError, IndexError, ValueError)


def kinds_of(suffix):
    return CHECKPOINTS if suffix == 'pth' else PICKLES


def bring(home, door, write):
    """'used' or the line with which a file is refused; where a door is crossed by code, an AssertionError."""
    suffix, enter = DOORS[door]
    before = os.getcwd()
    place = home.folder / f'case{next(home.number)}'
    place.mkdir()
    os.chdir(place)
    path = place / f'given.{suffix}'
    try:
        write(path, home.checkpoint)
        with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            try:
                enter(home, path)
                return 'used'
            except UserError as error:
                assert '\n' not in str(error), f'{door}: {error}'
                return str(error)
            except MEETS_NONSENSE as error:
                if suffix == 'pth':
                    raise
                return f'refused by the library: {type(error).__name__} {error}'
            finally:
                assert not list(place.rglob(EXECUTED)), f'{door}: code ran'
    finally:
        os.chdir(before)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=FIGURES / 'doors.json')
    args = parser.parse_args()
    rows, failures = {}, []
    with tempfile.TemporaryDirectory() as folder:
        home = Home(folder)
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        for door, (suffix, _) in DOORS.items():
            ends = dict(used=0, refused=0, crossed=0)
            for kind, write in kinds_of(suffix).items():
                try:
                    ends['used' if bring(home, door, write) == 'used' else 'refused'] += 1
                except Exception as error:
                    ends['crossed'] += 1
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    failures.append(f'{door}, {kind}: {type(error).__name__} {error} in {where.name}'[:300])
            print(door, ends, file=sys.stderr, flush=True)
            rows |= {f'{door}: {end}': count for end, count in ends.items()}
    report(args.out, rows, failures)


if __name__ == '__main__':
    main()
