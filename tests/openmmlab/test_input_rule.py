"""How a picture becomes an input, told to programs without OpenMMLab: as the pipeline of the test data does it."""

import importlib.util

import cv2
import numpy as np
import pytest
from PIL import Image

from gdrq_mm.openmmlab.pictures import batch_of, input_rule
from tests.helpers import ROOT
from tests.runs import tiny_config

spec = importlib.util.spec_from_file_location('exported', ROOT / 'examples/exported.py')
exported = importlib.util.module_from_spec(spec)
spec.loader.exec_module(exported)

FIT = dict(type='mmdet.Resize', scale=(120, 60), keep_ratio=True)
PIPELINES = {
    'as it is': [],
    'a fixed size': [dict(type='Resize', scale=(48, 32))],
    'one number': [dict(type='Resize', scale=40)],
    'into a rectangle, whichever way': [FIT],
    'as COCO': [dict(type='mmdet.Resize', scale=(1333, 800), keep_ratio=True)],
    'the short edge, and the middle': [dict(type='ResizeEdge', scale=50), dict(type='CenterCrop', crop_size=33)],
    'the long edge, bicubic': [dict(type='ResizeEdge', scale=50, edge='long', interpolation='bicubic')],
    'the middle of what may be smaller': [dict(type='CenterCrop', crop_size=(70, 45))],
    'into a square': [FIT, dict(type='mmdet.Pad', pad_to_square=True, pad_val=dict(img=(114, 114, 114)))],
    'filled up': [FIT, dict(type='mmcv.Pad', size=(128, 130), pad_val=7)],
}
SIZES = [(60, 90), (90, 60), (50, 50), (31, 100), (612, 306)]


def with_pipeline(digits_root, folder, transforms):
    cfg = tiny_config(digits_root, folder, quantization=None)
    pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.test_dataloader.dataset.pipeline = [pipeline[0], *transforms, pipeline[-1]]
    return cfg


def smooth(height, width):
    """A picture in which every way to scale gives nearly the same."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / width * 4 + i) + np.cos(y / height * 3 - i) for i in range(3)]
    return (127 + 60 * np.stack(waves, -1)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', PIPELINES)
def test_a_program_makes_of_a_picture_what_the_pipeline_makes(digits_root, tmp_path, name, size):
    cfg = with_pipeline(digits_root, tmp_path, PIPELINES[name])
    cv2.imwrite(str(tmp_path / 'picture.png'), smooth(*size))
    expected = batch_of(cfg, tmp_path / 'picture.png')['inputs'][0].permute(1, 2, 0).numpy()
    whole = dict(input=input_rule(cfg), any_size=True, channels='BGR')
    _, pixels, (width, height) = exported.read_picture(tmp_path / 'picture.png', whole, crops=True)
    assert pixels.shape == (1, *expected.shape)
    assert np.abs(pixels[0].astype(int) - expected).mean() < 1.5
    if 'filled' not in name and 'square' not in name and 'middle' not in name:
        assert (height, width) == expected.shape[:2]


@pytest.mark.parametrize(
    ('transforms', 'message'),
    [
        (
            [dict(type='mmcv.RandomGrayscale')],
            'RandomGrayscale with its defaults is not known to programs',
        ),
        ([dict(type='Resize', scale=40, interpolation='area')], "interpolation='area'"),
        ([dict(type='CenterCrop', crop_size=20), dict(type='Resize', scale=40)], 'Resize comes late'),
        ([dict(type='Resize', scale=40), dict(type='Resize', scale=50)], 'Resize comes late'),
        ([dict(type='mmcv.Pad', size_divisor=32)], 'Pad with size_divisor is not known'),
        ([dict(type='mmcv.Pad', size=(200, 400), pad_val=dict(img=(1, 2, 3)))], r'pad_val='),
    ],
)
def test_another_pipeline_is_refused(digits_root, tmp_path, transforms, message):
    found = input_rule(with_pipeline(digits_root, tmp_path, transforms))
    assert found.keys() == {'refused'} and found['refused'].startswith('the pipeline of the test data: ')
    assert message in found['refused']


def test_a_transform_that_does_not_do_what_its_name_says_is_refused(digits_root, tmp_path):
    from mmengine.registry import TRANSFORMS

    @TRANSFORMS.register_module(name='CenterCrop', force=True)
    class Whole:
        def __init__(self, crop_size):
            pass

        def __call__(self, results):
            return results

    cfg = with_pipeline(digits_root, tmp_path, [dict(type='mmengine.CenterCrop', crop_size=20)])
    assert 'a picture of 90 x 160 becomes 90 x 160' in input_rule(cfg)['refused']
    TRANSFORMS._module_dict.pop('CenterCrop')


def test_the_way_to_scale_and_a_crop_are_told(digits_root, tmp_path):
    bicubic = dict(type='ResizeEdge', scale=20, interpolation='bicubic')
    rule = input_rule(with_pipeline(digits_root, tmp_path, [bicubic, dict(type='CenterCrop', crop_size=16)]))
    assert rule['resize'] == dict(short=20, round='down', interpolation='bicubic')
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / 'noise.png')
    whole = dict(input={**rule, 'crop': None}, any_size=True, channels='RGB')
    expected = np.asarray(Image.fromarray(noise).resize((20, 20), Image.Resampling.BICUBIC))
    assert np.array_equal(exported.read_picture(tmp_path / 'noise.png', whole)[1][0], expected)
    with pytest.raises(SystemExit, match=r'cannot be made an input: the test pipeline crops it'):
        exported.read_picture(tmp_path / 'noise.png', {**whole, 'input': rule})


def test_pictures_of_16_bits_and_wrong_sizes(tmp_path):
    ramp = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    cv2.imwrite(str(tmp_path / 'gray.png'), ramp)
    assert Image.open(tmp_path / 'gray.png').mode.startswith('I;16')
    nothing = dict.fromkeys(('resize', 'crop', 'pad'))
    whole = dict(input=nothing, any_size=False, size=[30, 40], channels='RGB')
    _, pixels, _ = exported.read_picture(tmp_path / 'gray.png', whole)
    assert np.array_equal(pixels[0], cv2.imread(str(tmp_path / 'gray.png')))
    for change, message in (
        (dict(size=[30, 41]), r'gray\.png is 40 x 30 for the graph, which takes 41 x 30'),
        (dict(input=dict(refused='why')), r'gray\.png cannot be made an input: why'),
    ):
        with pytest.raises(SystemExit, match=message):
            exported.read_picture(tmp_path / 'gray.png', {**whole, **change})
