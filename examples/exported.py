"""What the examples share: an exported folder, and a picture as the test pipeline of its config makes it."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def open_exported(folder, task, usage):
    """The content of export.json, and a session of end2end.onnx; ends the program where the folder has none."""
    if not Path(folder, 'export.json').is_file():
        sys.exit(f'{usage}\nEXPORTED_FOLDER is what tools/export.py wrote.')
    about = json.loads(Path(folder, 'export.json').read_text())
    whole = about.get('end2end', {}) if about['task'] == task else {'refused': f'its task is {about["task"]}'}
    if about['export_version'] != 2 or 'file' not in whole:
        sys.exit(f'{folder} has no end2end.onnx for this: {whole.get("refused", "export the model again")}')
    if 'input' not in whole:
        sys.exit(f'{folder}/export.json has no input: export the model again')
    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry('session.x64quantprecision', '1')  # exact without VNNI too, slower with it
    try:
        return about, onnxruntime.InferenceSession(Path(folder, whole['file']), options)
    except Exception:  # onnxruntime 1.32 cannot do that where layers share weights, as in an RPN
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        return about, onnxruntime.InferenceSession(Path(folder, whole['file']), options)


def read_picture(path, whole, crops=False):
    """A picture, RGB; what end2end.onnx sees of it, (1, H, W, 3); and how wide and high it was scaled before a pad.

    Without `crops` the program ends where a part of the picture would be cut out.
    """
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
    except (OSError, Image.DecompressionBombError) as error:
        sys.exit(f'{path} cannot be read as a picture: {error}')
    if picture.mode.startswith('I;16'):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    picture, rule = picture.convert('RGB'), whole['input']
    if 'refused' in rule or (rule['crop'] and not crops):
        sys.exit(f'{path} cannot be made an input: {rule.get("refused", "the test pipeline crops it")}')
    seen, size = picture, picture.size
    if resize := rule['resize']:
        edges = dict(long=max(size), short=min(size))
        if 'width' in resize:
            size = resize['width'], resize['height']
        else:
            name = min(edges.keys() & resize.keys(), key=lambda each: resize[each] / edges[each])
            to, edge = resize[name], edges[name]
            size = [int(s * (to / edge) + 0.5) if resize['round'] == 'nearest' else int(to * s / edge) for s in size]
            size = max(size[0], 1), max(size[1], 1)
        seen = picture.resize(size, Image.Resampling[resize['interpolation'].upper()])
    if crop := rule['crop']:
        left, top = (max(round((side - crop[name]) / 2), 0) for side, name in zip(size, ('width', 'height')))
        seen = seen.crop((left, top, min(left + crop['width'], size[0]), min(top + crop['height'], size[1])))
    pixels = np.asarray(seen)
    if pad := rule['pad']:
        square = max(size) if pad.get('square') else 0
        more = [(0, max(square, pad.get(name, 0), old) - old) for name, old in zip(('height', 'width'), pixels.shape)]
        pixels = np.pad(pixels, [*more, (0, 0)], constant_values=int(pad['value']))
    if not whole['any_size'] and list(pixels.shape[:2]) != whole['size']:
        height, width = whole['size']
        sys.exit(f'{path} is {pixels.shape[1]} x {pixels.shape[0]} for the graph, which takes {width} x {height}')
    return picture, pixels[None, ..., :: 1 if whole['channels'] == 'RGB' else -1], size
