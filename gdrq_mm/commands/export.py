"""Export a trained quantized model as integers: ONNX graphs or a packed checkpoint, checked layer by layer."""

import argparse
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from rich.console import Console
from rich.table import Table

from ..core.compat import check_export
from ..core.config import Quantization
from ..core.errors import UserError, command
from ..core.files import check_writable
from ..deploy.export import ExportedPart, ExportReport, for_openvino, properties
from ..deploy.merge import IntegerLayer, merge_model
from ..deploy.packed import is_packed, write_packed
from ..deploy.runtime import RUNTIMES, installed_backends, integer_products
from ..deploy.verify import compare, first_difference
from ..openmmlab.apis import infer, init_model
from ..openmmlab.bundle import example_inputs, export_graphs, write_bundle
from ..openmmlab.cli import ConfigOptions, add_unsafe_load, check_data
from ..openmmlab.data_only import data_only
from ..openmmlab.deployed import EndToEnd
from ..openmmlab.parts import parts_of
from ..openmmlab.tasks import TASKS, task_of
from ..report.text import print_whole

CONSOLE = Console(markup=False)  # paths and names of layers are no markup, nor is an extra of the package


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of the quantized config')
    parser.add_argument('checkpoint', help='path of the trained checkpoint')
    parser.add_argument('--out', required=True, help='folder to write; it must not exist')
    parser.add_argument('--format', choices=['onnx', 'packed'], default='onnx', help='default: %(default)s')
    parser.add_argument(
        '--compress', action='store_true', help='with --format packed: smaller by the entropy of the codes'
    )
    parser.add_argument(
        '--for',
        dest='target',
        choices=['both', *RUNTIMES],
        default='both',
        help='runtime that the graphs are for; OpenVINO needs fewer quantizers (default: %(default)s)',
    )
    parser.add_argument(
        '--image',
        help='picture to check with; graphs that cannot take any size take its (default: first of the test set)',
    )
    parser.add_argument('--cfg-options', nargs='+', action=ConfigOptions, help='override settings: key=value')
    add_unsafe_load(parser)
    return parser.parse_args()


def first_picture(cfg: Config, unsafe: bool = False) -> str:
    """Path of the first picture of the config's test set.

    Raises:
        UserError: the data are not there.
    """
    try:
        name = next((name for name in ('test_dataloader', 'val_dataloader') if cfg.get(name)), None)
        if name is None:
            raise UserError('the config has no test_dataloader')
        check_data(cfg, [name])
        with data_only(unsafe):
            dataset = DATASETS.build(cfg[name].dataset)
            if hasattr(dataset, 'full_init'):  # as mmengine's Runner does
                dataset.full_init()
        path = dataset.get_data_info(0).get('img_path') if len(dataset) else None
    except (UserError, OSError) as error:
        raise UserError(f'{error}; or give a picture with --image') from None
    if path is None:
        raise UserError('the test set has no picture files; give a picture with --image')
    return path


def show(title: str, columns: list[str], rows: list[tuple[Any, ...]]) -> None:
    """Print a table whose first column is a name."""
    table = Table(title=title, title_justify='left', box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify='right' if number else 'left', no_wrap=not number)
    for row in rows:
        table.add_row(*map(str, row))
    print_whole(CONSOLE, table)


def show_part(part: ExportedPart) -> None:
    """How many codes each runtime makes otherwise than the trained model, and how far the furthest value is off."""
    codes, outputs = [], []
    for pieces in zip(*part.pieces.values(), strict=True):
        off = [f'{p.differing}' + (f', {p.wrong} wrong' if p.wrong else '') for p in pieces]
        furthest = f'{max(p.largest for p in pieces):.4f}'
        if pieces[0].step:
            codes.append((pieces[0].name, pieces[0].values, *off, furthest))
        else:
            outputs.append((pieces[0].name, pieces[0].values, furthest))
    columns = ['quantizer', 'codes', *part.pieces, 'furthest']
    show(f'\n{part.name}: codes that differ from the trained model', columns, codes)
    title = f'{part.name}: outputs; through the whole graph, a tie that was rounded otherwise may grow'
    show(title, ['output', 'values', 'largest relative difference'], outputs)
    report = ExportReport([part])
    for backend, differing in report.differing.items():
        why = ', by the rounding of ties and of biases' if differing else ''
        CONSOLE.print(f'{backend}: {differing} of {report.codes} codes differ{why}', soft_wrap=True)


def export_packed(model: Any, merged: Any, image: Any, out: Path, compress: bool) -> None:
    """Compare the merged model with the trained one and write model.safetensors, its codes compressed or not."""
    results = compare(model, merged, model.plan, lambda m: infer(m, image))
    columns = ['layer', 'outputs', 'wrong sums', 'difference', 'codes', 'ties', 'wrong']
    cells = [
        (r.outputs, r.accumulator_errors, f'{r.largest:.1e}', *((r.codes, r.ties, r.wrong) if r.codes else '---'))
        for r in results
    ]
    show('', columns, [(r.name, *cell) for r, cell in zip(results, cells)])
    difference = first_difference(results)
    if difference:
        raise UserError(f'{difference}; nothing was written')
    check_writable(out)
    path = out / 'model.safetensors'
    sizes = write_packed(merged, path, model.cfg.pretty_text, model.dataset_meta, compress)
    CONSOLE.print(f'{path}: {path.stat().st_size / 1e6:.2f} MB, {len(results)} layers as integers', soft_wrap=True)
    saved, possible = (1 - size / max(sizes.at_bits, 1) for size in (sizes.written, sizes.entropy))
    text = f'codes: {sizes.at_bits / 1e6:.3f} MB at their bits, {possible:.1%} less by their entropy'
    CONSOLE.print(f'{text}; compressed {saved:.1%} less' if compress else f'{text} (--compress)', soft_wrap=True)


def fit_openvino(model: Any, image: Any) -> Any:
    """The model as for_openvino() changes it; says how far its outputs are from those of the trained one."""
    fitted, names = for_openvino(model, model.plan)
    if not names:
        return model
    task = task_of(model.cfg)
    inputs = example_inputs(model, parts_of(model, task), lambda: infer(model, image))
    outputs: dict[Any, list[torch.Tensor]] = {model: [], fitted: []}
    with torch.no_grad():
        for each, values in outputs.items():
            for part in parts_of(each, task):
                values.extend(value.flatten() for value in part.module(*inputs[part.name]))
    one, other = (torch.cat(values) for values in outputs.values())
    off = float((one - other).norm() / one.norm())
    CONSOLE.print(
        f'For OpenVINO {len(names)} outputs in front of activation functions are not quantized. The trained model '
        f'quantizes them: its outputs differ by {100 * off:.2f} % of their norm. What follows compares with the model '
        f'without these quantizers; {command("test")} --backend openvino tells what leaving them out costs.',
        soft_wrap=True,
    )
    return fitted


def join_parts(model: Any, report: ExportReport, image: Any) -> EndToEnd | str:
    """The graph from pictures to predictions; or why there is none."""
    try:
        from ..openmmlab.decode.boxes import NotCovered  # torch before 2.4 has not what they are made of
        from ..openmmlab.end2end import export_end2end
    except ModuleNotFoundError as error:
        library = (error.name or '').partition('.')[0]
        if library not in TASKS:
            raise
        return f'it needs {", ".join(TASKS)}, and {library} is not installed'
    try:
        return export_end2end(model, report, lambda: infer(model, image))
    except NotCovered as reason:
        return str(reason)


def export_onnx(model: Any, merged: Any, image: Any, out: Path, checkpoint: str, target: str) -> None:
    """Export, verify and write the graphs."""
    report = export_graphs(model, merged, lambda: infer(model, image), show_part, target)
    installed = installed_backends()
    for name in RUNTIMES:
        if target == 'both' and name not in installed:
            CONSOLE.print(f"{name} is not installed and was not compared: uv pip install 'gdrq-mm[deploy]'")
    end2end = join_parts(model, report, image)
    write_bundle(out, model, checkpoint, report, end2end)
    if report.unread:
        CONSOLE.print(f'Not exported, as nothing reads what they make: {", ".join(report.unread)}', soft_wrap=True)
    narrow = [layer for layer in merged.modules() if isinstance(layer, IntegerLayer) and layer.weight_bits < 4]
    if narrow:
        CONSOLE.print(
            f'{len(narrow)} layers have weights of less than 4 bits, which take 4 in ONNX; --format packed takes as '
            'many as they have',
            soft_wrap=True,
        )
    for part in report.parts:
        path = out / f'{part.name}.onnx'
        text = f'{path}: {path.stat().st_size / 1e6:.2f} MB, for inputs of {sizes_of(part.graph)}'
        one = ExportReport([part])
        fused, whole = one.layers
        if whole:
            text += f'; ONNX Runtime runs {fused} of {whole} layers as integer kernels'
        if one.float_layers:
            others = ', '.join(one.float_layers)
            text += f', the others in float, most of them because their output is not quantized: {others}'
        fused, found = integer_products(part.graph) if whole else (0, 0)
        if found:
            text += f'; with integers too: {fused} of {found} products of two activations, as in attention'
        CONSOLE.print(text, soft_wrap=True)

    show_end2end(end2end, out, list(report.parts[0].pieces))


def show_end2end(end2end: EndToEnd | str, out: Path, runtimes: list[str]) -> None:
    """What end2end.onnx takes and gives, or why there is none."""
    if isinstance(end2end, str):
        CONSOLE.print(f'No end2end.onnx: {end2end}; decoding stays in torch', soft_wrap=True)
        return
    path = out / 'end2end.onnx'
    size = 'any size' if end2end.any_size else ' x '.join(map(str, end2end.size))
    CONSOLE.print(
        f'{path}: {path.stat().st_size / 1e6:.2f} MB, uint8 {end2end.channels} pictures (N, H, W, 3) of {size} -> '
        f'{", ".join(end2end.outputs)}; the same as the model predicts in {" and ".join(runtimes)}',
        soft_wrap=True,
    )


def sizes_of(graph: Any) -> str:
    """The inputs that a graph takes, in words."""
    props = properties(graph)
    shape = ' x '.join(map(str, props['shape']))
    return f'any size (traced with {shape})' if props['any_size'] else shape


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    if out.exists():
        raise UserError(f'--out {out} exists')
    if args.compress and args.format != 'packed':
        raise UserError('--compress is for --format packed; an ONNX graph holds its codes as they are')
    if args.target != 'both' and args.format == 'packed':
        raise UserError(f'--for {args.target}: a packed file is for no runtime')
    if args.target != 'both' and args.target not in installed_backends():
        raise UserError(f"--for {args.target}: it is not installed: uv pip install 'gdrq-mm[deploy]'")
    if is_packed(args.checkpoint):
        raise UserError(f'{args.checkpoint} is packed already; export the checkpoint of the training')
    if args.format == 'onnx':
        check_export()
    check_writable(out.parent, '--out: the folder')
    model = init_model(args.config, args.checkpoint, 'cpu', args.cfg_options, args.unsafe_load)
    if 'quantization' not in model.cfg:
        raise UserError(f'{args.config} has no quantization: there are no integers to export')
    image = args.image or first_picture(model.cfg, args.unsafe_load)
    if args.target == 'openvino':
        model = fit_openvino(model, image)
    merged = merge_model(model, model.plan)
    if not Quantization.from_dict(model.cfg.quantization).deployable:
        CONSOLE.print('The model was trained with deployable=False: more stays float, which is slower.')
    if args.format == 'packed':
        export_packed(model, merged, image, out, args.compress)
    else:
        export_onnx(model, merged, image, out, args.checkpoint, args.target)
