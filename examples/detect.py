#!/usr/bin/env python
"""Draw what an exported detector finds in a picture: onnxruntime, numpy and Pillow, nothing else.

python examples/detect.py EXPORTED_FOLDER PICTURE RESULT.png [LOWEST_SCORE]
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

if len(sys.argv) not in (4, 5) or not Path(sys.argv[1], 'export.json').is_file():
    sys.exit(f'{__doc__}\nEXPORTED_FOLDER is what tools/export.py wrote.')
folder = Path(sys.argv[1])
about = json.loads((folder / 'export.json').read_text())
whole = about.get('end2end', {}) if about['task'] == 'det' else {'refused': f'its task is {about["task"]}'}
if about['export_version'] != 2 or 'file' not in whole:
    sys.exit(f'{folder} has no end2end.onnx of a detector: {whole.get("refused", "export the model again")}')
try:
    picture = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert('RGB')
except OSError as error:
    sys.exit(f'{sys.argv[2]} cannot be read as a picture: {error}')
scale = np.divide(whole['size'][::-1], picture.size)
if whole['any_size']:  # keep its shape
    scale = np.full(2, scale.min())
size = np.maximum(np.round(scale * picture.size), 1).astype(int).tolist()
pixels = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))[..., :: 1 if whole['channels'] == 'RGB' else -1]
onnxruntime.set_default_logger_severity(3)
options = onnxruntime.SessionOptions()
options.add_session_config_entry('session.x64quantprecision', '1')  # exact without VNNI too, slower with it
try:
    session = onnxruntime.InferenceSession(folder / whole['file'], options)
except Exception:  # onnxruntime 1.32 cannot do that where layers share weights, as in an RPN
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(folder / whole['file'], options)
(dets,), (labels,) = session.run(['dets', 'labels'], {'image': pixels[None]})
draw = ImageDraw.Draw(picture)
least = float(sys.argv[4]) if len(sys.argv) == 5 else 0.3
for (*box, score), label in zip(dets, labels):
    if score > least:
        box, name = box / np.tile(scale, 2), about['classes'][label] if about['classes'] else label
        draw.rectangle(box.tolist(), outline='red')
        draw.text(box[:2].tolist(), f'{name} {score:.2f}', fill='red')
        print(f'{name}: {100 * score:.0f} % at ' + ', '.join(f'{side:.0f}' for side in box))
picture.save(sys.argv[3])
