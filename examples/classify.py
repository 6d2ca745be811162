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
from PIL import Image, ImageOps

if len(sys.argv) != 3 or not Path(sys.argv[1], 'export.json').is_file():
    sys.exit(f'{__doc__}\nEXPORTED_FOLDER is what tools/export.py wrote.')
folder = Path(sys.argv[1])
about = json.loads((folder / 'export.json').read_text())
whole = about.get('end2end', {}) if about['task'] == 'cls' else {'refused': f'its task is {about["task"]}'}
if about['export_version'] != 2 or 'file' not in whole:
    sys.exit(f'{folder} has no end2end.onnx of a classifier: {whole.get("refused", "export the model again")}')
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
scores, labels = session.run(['topk_scores', 'topk_labels'], {'image': pixels[None]})
for score, label in zip(scores[0, :3], labels[0]):
    print(f'{about["classes"][label] if about["classes"] else label}: {100 * score:.1f} %')
