"""Files that tests write, cut and change."""

import json
import shutil

import cv2
import numpy as np


def write(path, content):
    """Write text, JSON, or a picture (an array; from a number a grey one of 8x6)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, dict):
        path.write_text(json.dumps(content))
    else:
        content = np.full((6, 8, 3), content, np.uint8) if isinstance(content, int) else content
        assert cv2.imwrite(str(path), content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(change):
    """Changes a JSON file."""

    def edit(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def put(content):
    return lambda path: write(path, content)


def remove(path):
    path.unlink() if path.is_file() else shutil.rmtree(path)
