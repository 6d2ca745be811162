#!/usr/bin/env python
"""Merge a trained quantized model into integers, check them layer by layer, and write them as a packed file."""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from gdrq_mm.apis import infer, init_model
from gdrq_mm.cli import ConfigOptions, check_writable, main
from gdrq_mm.deploy import compare, merge_model, write_packed
from gdrq_mm.errors import UserError
from gdrq_mm.topology import record


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of the quantized config')
    parser.add_argument('checkpoint', help='path of the trained checkpoint')
    parser.add_argument('--out', required=True, help='folder to write; it must not exist')
    parser.add_argument('--image', help='picture on which both are compared (default: noise)')
    parser.add_argument('--cfg-options', nargs='+', action=ConfigOptions, help='override settings: key=value')
    parser.add_argument(
        '--unsafe-load', action='store_true', help='unpickle anything a checkpoint holds; that runs its code'
    )
    return parser.parse_args()


def export() -> None:
    args = parse_args()
    out = Path(args.out)
    if out.exists():
        raise UserError(f'--out {out} exists')
    model = init_model(args.config, args.checkpoint, 'cpu', args.cfg_options, args.unsafe_load)
    if 'quantization' not in model.cfg:
        raise UserError(f'{args.config} has no quantization: there are no integers to export')
    image = args.image or np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    topology = record(model, lambda: infer(model, image))
    merged = merge_model(model, topology)
    results = compare(model, merged, topology, lambda m: infer(m, image))
    table = Table(box=None, pad_edge=False)
    for column in ('layer', 'outputs', 'wrong sums', 'difference', 'codes', 'ties', 'wrong'):
        table.add_column(column, justify='left' if column == 'layer' else 'right', no_wrap=column == 'layer')
    for r in results:
        cells = (r.outputs, r.accumulator_errors, f'{r.largest:.1e}', r.codes, r.ties, r.wrong)
        table.add_row(r.name, *map(str, cells))
    console = Console()
    console.print(table)
    wrong = next((r.name for r in results if r.accumulator_errors or r.wrong or r.largest > 1e-4), None)
    if wrong is not None:
        raise UserError(f'the merged model differs from the trained one, first in layer {wrong}; nothing was written')
    check_writable(out)
    path = out / 'model.gdrq'
    write_packed(merged, path, model.cfg.pretty_text)
    console.print(f'{path}: {path.stat().st_size / 1e6:.2f} MB, {len(results)} layers as integers', soft_wrap=True)


if __name__ == '__main__':
    main(export)
