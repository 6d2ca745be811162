#!/usr/bin/env python
"""Segment a picture with an exported model: onnxruntime, numpy and Pillow, nothing else.

python examples/segment.py EXPORTED_FOLDER PICTURE MASK.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

if len(sys.argv) != 4 or not Path(sys.argv[1], 'export.json').is_file():
    sys.exit(f'{__doc__}\nEXPORTED_FOLDER is what tools/export.py wrote.')
folder = Path(sys.argv[1])
about = json.loads((folder / 'export.json').read_text())
whole = about.get('end2end', {}) if about['task'] == 'seg' else {'refused': f'its task is {about["task"]}'}
if about['export_version'] != 2 or 'file' not in whole:
    sys.exit(f'{folder} has no end2end.onnx of a segmentor: {whole.get("refused", "export the model again")}')
height, width = whole['size']
try:
    picture = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert('RGB')
except OSError as error:
    sys.exit(f'{sys.argv[2]} cannot be read as a picture: {error}')
pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
pixels = pixels[..., :: 1 if whole['channels'] == 'RGB' else -1]

onnxruntime.set_default_logger_severity(3)
options = onnxruntime.SessionOptions()
options.add_session_config_entry('session.x64quantprecision', '1')  # exact without VNNI too, slower with it
session = onnxruntime.InferenceSession(folder / whole['file'], options)
(labels,) = session.run(['labels'], {'image': pixels[None]})[0]
mask = Image.fromarray(labels.astype(np.uint8), 'P').resize(picture.size, Image.Resampling.NEAREST)
mask.putpalette(np.random.default_rng(1).integers(0, 256, 768, np.uint8).tobytes())
mask.save(sys.argv[3])
for index, count in zip(*np.unique(labels, return_counts=True)):
    name = about['classes'][index] if about['classes'] else index
    print(f'{name}: {100 * count / labels.size:.1f} % of the picture')
