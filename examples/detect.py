#!/usr/bin/env python
"""Draw what an exported detector finds in a picture: onnxruntime, numpy and Pillow, nothing else.

python examples/detect.py EXPORTED_FOLDER PICTURE RESULT.png [LOWEST_SCORE]
"""

import sys

import numpy as np
from exported import open_exported, read_picture
from PIL import ImageDraw

if len(sys.argv) not in (4, 5):
    sys.exit(__doc__)
about, session = open_exported(sys.argv[1], 'det', __doc__)
picture, pixels, size = read_picture(sys.argv[2], about['end2end'])
(dets,), (labels,) = session.run(['dets', 'labels'], {'image': pixels})
draw, scale = ImageDraw.Draw(picture), np.divide(size, picture.size)
least = float(sys.argv[4]) if len(sys.argv) == 5 else 0.3
for (*box, score), label in zip(dets, labels):
    if score > least:
        box, name = box / np.tile(scale, 2), about['classes'][label] if about['classes'] else label
        draw.rectangle(box.tolist(), outline='red')
        draw.text(box[:2].tolist(), f'{name} {score:.2f}', fill='red')
        print(f'{name}: {100 * score:.0f} % at ' + ', '.join(f'{side:.0f}' for side in box))
picture.save(sys.argv[3])
