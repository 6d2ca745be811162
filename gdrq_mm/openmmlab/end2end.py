"""end2end.onnx: from uint8 pictures to detections, classes or a label map, with the graphs of a model inside.

The graphs of the parts stay as they were verified. What stands in front of them, between them and behind them is in
decode/; the whole chain is compared with what the library predicts before it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import torch
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmdet.structures import DetDataSample
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from torch import Tensor

from ..core.errors import UserError
from ..core.modules import hooked
from ..deploy.chain import Step, export_steps, join, run_chain
from ..deploy.export import ExportReport, properties
from ..deploy.runtime import open_runtime
from .decode.boxes import NotCovered, keeps_methods, name_of
from .decode.dense import Detect
from .decode.ops import TRANSLATIONS
from .decode.pictures import LabelMap, Prepare, Scores
from .decode.transformer import Positions, Queries
from .decode.two_stage import Classify, Cut, Masks, Pool, Propose, Regress
from .deployed import EndToEnd, takes_rgb, to_graph
from .parts import heads_of, parts_of
from .tasks import task_of

LARGER = (32, 64)
"""How much higher and wider the picture is that an open size is compared with."""
DOUBLINGS = 4
"""How often the picture is doubled, at most, that has but one cell in a level of a pyramid (ours)."""
IOU, NEAR, SCORE = 0.99, 0.01, 0.01
"""Two boxes are the same above this IoU, or with all sides this near in pixels, and within this score."""
FEW = 10
"""Of fewer boxes a comparison says too little (ours)."""
SHARE = 0.02
"""Boxes may have no partner where a threshold or a rounding tie fell on the other side: such a share (ours)."""


def export_end2end(model: Any, report: ExportReport, predict: Callable[[], Any]) -> EndToEnd:
    """Join the exported parts of a model into one graph from pictures to predictions.

    Args:
        model: the trained model, in evaluation mode.
        report: of its parts.
        predict: runs the model on one picture.

    Raises:
        NotCovered: the model predicts in a way for which there is no ONNX here.
        UserError: the graph does not predict what the model does.
    """
    any_size = properties(report.parts[0].graph)['any_size']
    steps, outputs = chain_of(model, report)
    image = picture_of(model, predict)
    graphs = export_steps(steps, values_to_trace(steps, image), TRANSLATIONS)
    whole = join(steps, graphs, outputs)
    shown = torch.nn.functional.pad(image, (0, 0, 0, LARGER[1], 0, LARGER[0]), value=127) if any_size else image
    values = run_chain(steps, shown)
    wrong = unlike_model(model, values) or unlike_model_with_more_boxes(model, report, values)
    for backend in report.parts[0].pieces:  # the runtimes that its parts are verified in
        wrong = wrong or unlike_torch(steps, graphs, values, backend)
    if wrong:
        raise UserError(f'end2end.onnx does not predict what the model does: {wrong}; nothing was written')
    channels = 'RGB' if takes_rgb(model) else 'BGR'
    onnx.helper.set_model_props(whole, dict(layout='NHWC', channels=channels))
    return EndToEnd(whole, list(image.shape[1:3]), any_size, channels, outputs)


def chain_of(model: Any, report: ExportReport) -> tuple[list[Step], list[str]]:
    """The steps from a picture to predictions, and the names of these.

    Raises:
        NotCovered: the model predicts in a way for which there is no ONNX here.
    """
    task = task_of(model.cfg)
    parts = {part.name: (part.module, found.graph) for part, found in zip(parts_of(model, task), report.parts)}
    about = properties(report.parts[0].graph)
    if about['shape'][0] != len('RGB'):
        raise NotCovered(f'its pictures have {about["shape"][0]} channels')
    every = (0, 2, 3) if about['any_size'] else (0,)
    (module, graph), *heads = parts.values()
    raw = [f'y{i}' for i in range(len(graph.graph.output))]
    axes = {'image': (0, 1, 2) if about['any_size'] else (0,), 'x': every, **dict.fromkeys(raw, every)}
    prepare = Prepare(model.data_preprocessor, None if about['any_size'] else about['shape'][1:])
    start = [Step('prepare', prepare, ['image'], ['x'], axes), Step('', module, ['x'], raw, graph=graph)]
    if task == 'cls':
        outputs = ['scores', 'topk_scores', 'topk_labels']
        return [*start, Step('decode', Scores(model.head), raw, outputs, {'y0': (0,)})], outputs
    if task == 'seg':
        return [*start, Step('decode', LabelMap(model), ['image', 'x', *raw], ['labels'], axes)], ['labels']
    if not heads:
        if not keeps_methods(model, SingleStageDetector, 'predict'):
            raise NotCovered(f'{name_of(model)} predicts in a way of its own')
        detect, outputs = Detect(model.bbox_head, about['structure']), ['dets', 'labels']
        return [*start, Step('decode', detect, ['image', *raw], outputs, axes)], outputs
    if 'encoder' in parts:
        return _transformer(model, start, parts, axes)
    if not keeps_methods(model, TwoStageDetector, 'predict'):
        raise NotCovered(f'{name_of(model)} predicts in a way of its own')
    return _two_stage(model, about['structure'], start, parts, axes)


def _transformer(
    model: Any, steps: list[Step], parts: dict[str, Any], axes: dict[str, Any]
) -> tuple[list[Step], list[str]]:
    """The steps of :func:`chain_of` for DETR."""
    tokens, queries, outputs = ['tokens', 'positions', 'mask'], ['bbox_head.y0', 'bbox_head.y1'], ['dets', 'labels']
    axes = {**axes, **dict.fromkeys(queries, (0,))}
    ends = dict(
        encoder=(tokens, ['encoder.y0']),
        decoder=(['encoder.y0', *tokens[1:]], ['decoder.y0']),
        bbox_head=(['decoder.y0'], queries),
    )
    inner = [Step(name, parts[name][0], *each, graph=parts[name][1]) for name, each in ends.items()]
    first = Step('positions', Positions(model), steps[-1].gives, tokens, axes)
    last = Step('decode', Queries(model.bbox_head), ['image', *queries], outputs, axes)
    return [*steps, first, *inner, last], outputs


def _two_stage(
    model: Any, structure: Any, steps: list[Step], parts: dict[str, Any], axes: dict[str, Any]
) -> tuple[list[Step], list[str]]:
    """The steps of :func:`chain_of`; in a cascade each stage moves the regions that the next one classifies."""
    raw, roi = list(steps[-1].gives), model.roi_head
    features = [raw[i] for i in structure[0]]
    boxes, masks = heads_of(roi, 'bbox_head'), heads_of(roi, 'mask_head')
    axes = dict(axes)

    def run(name: str, extractor: Any, regions: str, outputs: int) -> tuple[list[Step], list[str]]:
        """A head on the regions that are pooled for it, and what it gives."""
        (module, graph), x, gives = parts[name], f'{name}.x', [f'{name}.y{i}' for i in range(outputs)]
        axes.update(dict.fromkeys([regions, x, *gives], (0,)))
        pool = Step(f'{name}.pool', Pool(extractor), [regions, *features], [x], axes)
        return [pool, Step(name, module, [x], gives, graph=graph)], gives

    regions, scores = 'regions.dets', list[str]()
    steps = [*steps, Step('propose', Propose(model, structure), ['image', *raw], [regions, 'regions.labels'], axes)]
    for (name, head), extractor in zip(boxes.items(), heads_of(roi, 'bbox_roi_extractor').values(), strict=True):
        classified, (score, deltas) = run(name, extractor, regions, 2)
        steps, scores = [*steps, *classified], [*scores, score]
        if len(scores) < len(boxes):
            moved = f'{name}.regions'
            steps.append(Step(f'{name}.move', Regress(head), ['image', regions, score, deltas], [moved], axes))
            regions = moved
    found, outputs = ['all.dets', 'all.labels'], ['dets', 'labels']
    steps.append(Step('classify', Classify(model), ['image', regions, deltas, *scores], found, axes))
    if masks:
        logits: list[str] = []
        for name, extractor in zip(masks, heads_of(roi, 'mask_roi_extractor').values(), strict=True):
            masked, gives = run(name, extractor, found[0], 1)
            steps, logits = [*steps, *masked], [*logits, *gives]
        steps.append(Step('masks', Masks(model), [found[1], *logits], ['all.masks'], axes))
        found, outputs = [*found, 'all.masks'], [*outputs, 'masks']
    axes.update(dict.fromkeys(found, (0,)))
    return [*steps, Step('cut', Cut(), found, outputs, axes)], outputs


def picture_of(model: Any, predict: Callable[[], Any]) -> Tensor:
    """The picture of a prediction as the graph takes it: uint8 (1, H, W, C).

    Raises:
        NotCovered: the pipeline of the test data makes something else of pictures.
    """
    found: list[Tensor] = []
    keep = model.data_preprocessor.register_forward_pre_hook(lambda module, args: found.append(args[0]['inputs'][0]))
    with hooked([keep]), torch.no_grad():
        predict()
    pixels = found[0].clamp(0, 255).to(torch.uint8)
    if not torch.equal(pixels.to(found[0].dtype), found[0]):  # to_float32=True leaves the values
        raise NotCovered('the pipeline of its test data makes no pictures of 8 bits: it normalizes, or scales floats')
    return to_graph(model, pixels)[None]


def values_to_trace(steps: Sequence[Step], image: Tensor) -> dict[str, Tensor]:
    """The values of a chain for two pictures, so large that no open size is 1: the exporter would keep that one."""
    pictures, traced = torch.cat([image, image.flip(2)]), [step for step in steps if step.graph is None]
    values = run_chain(steps, pictures)
    for _ in range(DOUBLINGS):
        taken = [(values[name].shape, step.open_axes.get(name, ())) for step in traced for name in step.takes]
        if all(shape[axis] > 1 for shape, axes in taken for axis in axes):
            break
        _, height, width, _ = pictures.shape
        pictures = torch.nn.functional.pad(pictures, (0, 0, 0, width, 0, height), value=127)
        values = run_chain(steps, pictures)
    return values


def from_graph(model: Any, pixels: Tensor) -> Tensor:
    """The inverse of :func:`to_graph`."""
    pixels = pixels.permute(2, 0, 1)
    return pixels.flip(0) if takes_rgb(model) else pixels


SAMPLES = dict(cls=DataSample, det=DetDataSample, seg=SegDataSample)


def unlike_model(model: Any, values: Mapping[str, Tensor]) -> str:
    """How a chain, run in torch on one picture, differs from the library's own prediction; '' if it does not."""
    image, task = values['image'], task_of(model.cfg)
    shape = tuple(image.shape[1:3])
    meta = dict(img_id=0, img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0))
    with torch.no_grad():
        (sample,) = model.test_step(
            dict(inputs=[from_graph(model, image[0])], data_samples=[SAMPLES[task](metainfo=meta)])
        )
    if task == 'cls':
        return _apart('scores', values['scores'][0], sample.pred_score)
    if task == 'seg':
        return _apart('labels', values['labels'][0], sample.pred_sem_seg.data[0])
    wanted = sample.pred_instances
    expected = torch.cat([wanted.bboxes, wanted.scores[:, None]], 1), wanted.labels
    return _other_boxes('dets', (values['dets'][0], values['labels'][0]), expected)


def unlike_model_with_more_boxes(model: Any, report: ExportReport, values: Mapping[str, Tensor]) -> str:
    """As :func:`unlike_model`, with a lower `score_thr` where a picture has too few boxes to compare."""
    head = getattr(model, 'roi_head', None) or getattr(model, 'bbox_head', None)
    cfg = getattr(head, 'test_cfg', None) if 'dets' in values else None
    if not cfg or 'score_thr' not in cfg or int((values['labels'][0] >= 0).sum()) >= FEW:
        return ''
    before = cfg.score_thr
    try:
        cfg.score_thr = 0
        scores = run_chain(chain_of(model, report)[0], values['image'])['dets'][0, :, 4]
        if not len(scores):
            return ''
        cfg.score_thr = float(scores.topk(min(FEW, len(scores))).values[-1]) * (1 - SCORE)
        return unlike_model(model, run_chain(chain_of(model, report)[0], values['image']))
    finally:
        cfg.score_thr = before


def unlike_torch(
    steps: Sequence[Step], graphs: Sequence[onnx.ModelProto], values: Mapping[str, Tensor], backend: str
) -> str:
    """How a step in a runtime differs from torch on the same inputs, where it is not a part that is verified already.

    Args:
        values: of the chain in torch.
    """
    for step, graph in zip(steps, graphs, strict=True):
        if step.graph is not None:
            continue
        inputs = [values[value.name].numpy() for value in graph.graph.input]
        found = dict(zip(step.gives, map(torch.from_numpy, open_runtime(backend, graph.SerializeToString())(inputs))))
        for name in step.gives:
            wrong = ''
            if name.endswith('dets'):
                labels = name.replace('dets', 'labels')
                wrong = _other_boxes(name, *((each[name][0], each[labels][0]) for each in (found, values)))
            elif found[name].is_floating_point() or len(step.gives) == 1:
                wrong = _apart(name, found[name], values[name])
            if wrong:
                return f'{backend}: {wrong}'
    return ''


def _apart(name: str, found: Tensor, expected: Tensor) -> str:
    """Says how many values differ, if more than a threshold or a tie explains do."""
    if found.shape != expected.shape:
        return f'{name} has shape {tuple(found.shape)} and not {tuple(expected.shape)}'
    finite = expected[expected.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    off = int((~((found - expected).abs() <= 1e-3 * largest) & (found != expected)).sum())
    return f'{off} of {found.numel()} values of {name} differ' if off > SHARE * found.numel() else ''


def _other_boxes(name: str, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> str:
    """Says how many of (K, 5) boxes with (K,) labels have no partner, if more than a threshold or a tie explains do."""
    found, expected = ((dets[dets[:, 4] > 0], labels[dets[:, 4] > 0]) for dets, labels in (found, expected))
    missing, added = without_partner(*expected, *found), without_partner(*found, *expected)
    if max(missing, added) <= SHARE * max(len(found[0]), len(expected[0])) + 1:
        return ''
    return f'of {len(expected[0])} boxes in {name} {missing} are missing, of {len(found[0])} {added} are too many'


def without_partner(dets: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor) -> int:
    """How many of (K, 5) detections have no partner of the same label among others, by IOU and SCORE."""
    low = torch.maximum(dets[:, None, :2], others[None, :, :2])
    high = torch.minimum(dets[:, None, 2:4], others[None, :, 2:4])
    both = (high - low).clamp(min=0).prod(-1)
    area, other = ((x[:, 2:4] - x[:, :2]).prod(-1) for x in (dets, others))
    same = both > IOU * (area[:, None] + other[None] - both)
    same |= (dets[:, None, :4] - others[None, :, :4]).abs().amax(-1) < NEAR  # they may have no area
    same &= (dets[:, None, 4] - others[None, :, 4]).abs() < SCORE
    same &= labels[:, None] == other_labels[None]
    return int((~same.any(1)).sum()) if len(others) else len(dets)
