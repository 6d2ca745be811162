#!/usr/bin/env python
"""Segment a picture with an exported model: onnxruntime, numpy and Pillow, nothing else.

python examples/segment.py EXPORTED_FOLDER PICTURE MASK.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

if len(sys.argv) != 4 or not Path(sys.argv[1], 'export.json').is_file():
    sys.exit(f'{__doc__}\nEXPORTED_FOLDER is what tools/export.py wrote.')
folder = Path(sys.argv[1])
about = json.loads((folder / 'export.json').read_text())
part = about['parts']['model']
_, height, width = part['shape']

picture = Image.open(sys.argv[2]).convert('RGB')
pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), np.float32)
if not about['rgb']:
    pixels = pixels[..., ::-1]
image = ((pixels - (about['mean'] or 0)) / (about['std'] or 1)).astype(np.float32).transpose(2, 0, 1)[None]

onnxruntime.set_default_logger_severity(3)
options = onnxruntime.SessionOptions()
options.add_session_config_entry('session.x64quantprecision', '1')  # exact without VNNI too, slower with it
session = onnxruntime.InferenceSession(folder / part['file'], options)
logits = session.run(None, {'x': image})[0][0]
logits = [np.asarray(Image.fromarray(one).resize(picture.size, Image.Resampling.BILINEAR)) for one in logits]
labels = np.argmax(logits, 0).astype(np.uint8)
mask = Image.fromarray(labels, 'P')
mask.putpalette(np.random.default_rng(1).integers(0, 256, 768, np.uint8).tobytes())
mask.save(sys.argv[3])
for index, count in zip(*np.unique(labels, return_counts=True)):
    name = about['classes'][index] if about['classes'] else index
    print(f'{name}: {100 * count / labels.size:.1f} % of the picture')
