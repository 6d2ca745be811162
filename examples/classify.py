#!/usr/bin/env python
"""Classify a picture with an exported model: onnxruntime, numpy and Pillow, nothing else.

python examples/classify.py EXPORTED_FOLDER PICTURE
"""

import sys

from exported import open_exported, read_picture

if len(sys.argv) != 3:
    sys.exit(__doc__)
about, session = open_exported(sys.argv[1], 'cls', __doc__)
_, pixels, _ = read_picture(sys.argv[2], about['end2end'], crops=True)
scores, labels = session.run(['topk_scores', 'topk_labels'], {'image': pixels})
for score, label in zip(scores[0, :3], labels[0]):
    print(f'{about["classes"][label] if about["classes"] else label}: {100 * score:.1f} %')
