#!/usr/bin/env python
"""Segment a picture with an exported model: onnxruntime, numpy and Pillow, nothing else.

python examples/segment.py EXPORTED_FOLDER PICTURE MASK.png
"""

import sys

import numpy as np
from exported import open_exported, read_picture
from PIL import Image

if len(sys.argv) != 4:
    sys.exit(__doc__)
about, session = open_exported(sys.argv[1], 'seg', __doc__)
picture, pixels, (width, height) = read_picture(sys.argv[2], about['end2end'])
labels = session.run(['labels'], {'image': pixels})[0][0, :height, :width]
mask = Image.fromarray(labels.astype(np.uint8), 'P').resize(picture.size, Image.Resampling.NEAREST)
mask.putpalette(np.random.default_rng(1).integers(0, 256, 768, np.uint8).tobytes())
mask.save(sys.argv[3])
for index, count in zip(*np.unique(labels, return_counts=True)):
    name = about['classes'][index] if about['classes'] else index
    print(f'{name}: {100 * count / labels.size:.1f} % of the picture')
