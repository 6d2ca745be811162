"""Draw what a model predicts for a picture: class, boxes or mask."""

import argparse
from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config

from ..core.errors import UserError
from ..openmmlab.apis import draw, infer, init_model
from ..openmmlab.cli import ConfigOptions, add_unsafe_load, read_config
from ..report.plots import side_by_side


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of the config')
    parser.add_argument('checkpoint', help='path of the checkpoint')
    parser.add_argument('image', help='path of the picture')
    parser.add_argument('--out', required=True, help='PNG to write')
    parser.add_argument('--beside', metavar='CHECKPOINT', help='float checkpoint whose prediction is drawn to the left')
    parser.add_argument('--score-thr', type=float, default=0.3, help='leave out boxes below this score (default: 0.3)')
    parser.add_argument('--device', help='such as cuda:0 (default: a GPU if there is one)')
    parser.add_argument('--cfg-options', nargs='+', action=ConfigOptions, help='override settings: key=value')
    add_unsafe_load(parser)
    return parser.parse_args()


def predicted(args: argparse.Namespace, cfg: Config, checkpoint: str) -> np.ndarray:
    """The picture with what a model predicts drawn into it."""
    model = init_model(cfg, checkpoint, args.device, unsafe_load=args.unsafe_load)
    return draw(model, args.image, infer(model, args.image), args.score_thr)


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    if out.suffix != '.png':
        raise UserError(f'--out {out} does not end in .png')
    cfg = read_config(args.config, args.cfg_options)
    picture = predicted(args, cfg, args.checkpoint)
    if args.beside:
        if cfg.pop('quantization', None) is None:
            raise UserError(f'--beside: {args.config} has no quantization: there is nothing to compare')
        picture = side_by_side([[predicted(args, cfg, args.beside), picture]], ['float', 'quantized'])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--out {out} cannot be written: {error.strerror}') from None
    if not cv2.imwrite(str(out), picture[..., ::-1]):
        raise UserError(f'--out {out} cannot be written')
    print(out)
