"""Draw what a model predicts for a picture: class, boxes or mask."""

import argparse
from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config

from ..core.errors import UserError, command
from ..openmmlab.apis import draw, infer, init_model
from ..openmmlab.cli import ConfigOptions, add_unsafe_load, read_config
from ..report.plots import side_by_side
from ..report.record import RUNTIMES


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of the config')
    parser.add_argument('checkpoint', help='path of the checkpoint')
    parser.add_argument('image', help='path of the picture')
    parser.add_argument('--out', required=True, help='PNG to write')
    parser.add_argument('--beside', metavar='CHECKPOINT', help='float checkpoint whose prediction is drawn to the left')
    parser.add_argument('--score-thr', type=float, default=0.3, help='leave out boxes below this score (default: 0.3)')
    parser.add_argument('--backend', choices=RUNTIMES, help='runtime that runs the exported graphs (default: torch)')
    parser.add_argument('--exported', help=f'folder that {command("export")} wrote, for --backend')
    parser.add_argument('--parts', action='store_true', help='run the graphs of the parts, not end2end.onnx')
    parser.add_argument('--device', help='such as cuda:0 (default: a GPU if there is one)')
    parser.add_argument('--cfg-options', nargs='+', action=ConfigOptions, help='override settings: key=value')
    add_unsafe_load(parser)
    args = parser.parse_args()
    if bool(args.backend) != bool(args.exported):
        raise UserError('--backend and --exported DIR belong together')
    if args.parts and not args.backend:
        raise UserError('--parts belongs to --backend and --exported DIR')
    if args.backend and args.device not in (None, 'cpu'):
        raise UserError(f'--device {args.device}: {args.backend} runs on the CPU here')
    return args


def predicted(args: argparse.Namespace, cfg: Config, checkpoint: str, exported: str | None = None) -> np.ndarray:
    """The picture with what a model predicts drawn into it, by its exported graphs or in torch."""
    model = init_model(cfg, checkpoint, 'cpu' if exported else args.device, unsafe_load=args.unsafe_load)
    if exported:
        from ..openmmlab.bundle import use_runtime  # with onnx, an extra of the package

        use_runtime(model, exported, args.backend, checkpoint, parts=args.parts)
    return draw(model, args.image, infer(model, args.image), args.score_thr)


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    if out.suffix != '.png':
        raise UserError(f'--out {out} does not end in .png')
    cfg = read_config(args.config, args.cfg_options)
    picture = predicted(args, cfg, args.checkpoint, args.exported)
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
