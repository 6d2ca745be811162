#!/usr/bin/env python
"""Classify a picture with an exported model: onnxruntime, numpy and Pillow, nothing else.

The picture is scaled to the input size; a test pipeline that crops gives slightly other scores.

python examples/classify.py EXPORTED_FOLDER PICTURE
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

if len(sys.argv) != 3 or not Path(sys.argv[1], 'export.json').is_file():
    sys.exit(f'{__doc__}\nEXPORTED_FOLDER is what tools/export.py wrote.')
folder = Path(sys.argv[1])
about = json.loads((folder / 'export.json').read_text())
part = about['parts']['model']
_, height, width = part['shape']

picture = Image.open(sys.argv[2]).convert('RGB').resize((width, height), Image.Resampling.BILINEAR)
pixels = np.asarray(picture, np.float32)
if not about['rgb']:
    pixels = pixels[..., ::-1]
image = ((pixels - (about['mean'] or 0)) / (about['std'] or 1)).astype(np.float32).transpose(2, 0, 1)[None]

onnxruntime.set_default_logger_severity(3)
options = onnxruntime.SessionOptions()
options.add_session_config_entry('session.x64quantprecision', '1')  # exact without VNNI too, slower with it
session = onnxruntime.InferenceSession(folder / part['file'], options)
(scores,) = session.run(None, {'x': image})[0]
probabilities = np.exp(scores - scores.max())
probabilities /= probabilities.sum()
for index in probabilities.argsort()[::-1][:3]:
    name = about['classes'][index] if about['classes'] else index
    print(f'{name}: {100 * probabilities[index]:.1f} %')
