"""Stock configs of the three libraries with the quantization base config: quantized, trained, saved, loaded, used.

Only the size of a model is changed, by its own keys; the images are tiny noise.
"""

import itertools
import re

import pytest
from mmdet.models import SSDHead

from gdrq_mm.core.attention import Projection
from gdrq_mm.core.layers import QUANTIZED
from gdrq_mm.core.modules import activation_quantizers, quant_layers
from gdrq_mm.core.products import factor_bits
from gdrq_mm.core.quantizers import Quantizer, Stage
from gdrq_mm.core.quantizers.minmax import AttentionWeights
from gdrq_mm.report.layers import layer_table
from tests.helpers import same
from tests.runs import At
from tests.stock import FEW_REGIONS, MASK_RCNN, YOLOX, Images, build, check_result, predict, settle


def case(name, stock, first, last, floats='$^', missed='$^', products=0, **options):
    """A row of the table.

    Args:
        name: of the test.
        stock: the library's config.
        first: the layers that read the image, see `expand`.
        last: the last layers, see `expand`.
        floats: pattern of the layers that stay float because of their class.
        missed: pattern of the layers whose `forward` is never called.
        products: how many products of two activations have 8 bits.
        options: of `build`.
    """
    expected = dict(first=expand(first), last=expand(last), floats=floats, missed=missed, products=products)
    return pytest.param(dict(stock=stock, **options), expected, id=name)


def expand(text):
    """The names in a text, with braces as in a shell: 'a.{b,c} d' is a.b, a.c and d."""
    words = [[part.split(',') for part in re.split('[{}]', word)] for word in text.split()]
    return {''.join(parts) for word in words for parts in itertools.product(*word)}


LOOKED_UP = r'(query_embedding|(level|pos)_embed|cls_emb|(cls|dist)_token|relative_position_bias_table)(\.weight)?$'
"""Parameters of two and more dimensions that no layer multiplies by."""
SMALL_DETR = {'encoder.num_layers': 1, 'decoder.num_layers': 2, 'num_queries': 20, 'test_cfg.max_per_img': 20}
CASES = [
    # ---- classification
    case(
        'depthwise-and-SE',
        'mmpretrain::mobilenet_v3/mobilenet-v3-small-050_8xb128_in1k.py',
        first='backbone.layer0.conv',
        last='head.layers.1.fc',
    ),
    case(
        'channel-shuffle',
        'mmpretrain::shufflenet_v2/shufflenet-v2-1x_16xb64_in1k.py',
        first='backbone.conv1.conv',
        last='head.fc',
    ),
    case(
        'grouped',
        'mmpretrain::resnext/resnext50-32x4d_8xb32_in1k.py',
        first='backbone.conv1',
        last='head.fc',
    ),
    case(
        'padding-of-its-own',
        'mmpretrain::efficientnet/efficientnet-b0_8xb32_in1k.py',
        first='backbone.layers.0.conv',
        last='head.fc',
    ),
    case(
        'parallel-branches',
        'mmpretrain::repvgg/repvgg-A0_8xb32_in1k.py',
        first='backbone.stem.branch_{1x1,3x3}.conv',
        last='head.fc',
    ),
    case(
        'Swin',
        'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
        products=2 * 12,
        first='backbone.patch_embed.projection',
        last='head.fc',
        model={'backbone.pad_small_map': True},
    ),
    case(
        'DeiT-two-heads',
        'mmpretrain::deit/deit-tiny-distilled_4xb256_in1k.py',
        products=2 * 12,
        first='backbone.patch_embed.projection',
        last='head.layers.{head,head_dist}',
        model={'backbone.img_size': 64},
    ),
    case(
        'BEiT-weights-read-directly',
        'mmpretrain::beit/benchmarks/beit-base-p16_8xb128-coslr-100e_in1k.py',
        products=2 * 2,
        first='backbone.patch_embed.projection',
        last='head.fc',
        floats=r'attn\.qkv$',
        model={
            'backbone.arch': dict(_delete_=True, embed_dims=96, num_layers=2, num_heads=4, feedforward_channels=192),
            'backbone.img_size': 64,
            'head.in_channels': 96,
        },
    ),
    # ---- detection
    case(
        'RetinaNet',
        'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
        first='backbone.conv1',
        last='bbox_head.retina_{cls,reg}',
    ),
    case(
        'SSDLite',
        'mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py',
        first='backbone.conv1.conv',
        last='bbox_head.{cls,reg}_convs.{0,1,2,3,4,5}.1',
    ),
    case(
        'FCOS',
        'mmdet::fcos/fcos_r18_fpn_gn-head-center-normbbox-centeronreg-giou_8xb8-amp-lsj-200e_coco.py',
        first='backbone.conv1',
        last='bbox_head.conv_{cls,reg,centerness}',
    ),
    case(
        'RTMDet-shared-convolutions-dynamic-kernels',
        'mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py',
        first='backbone.stem.0.conv',
        last='bbox_head.rtm_{cls,reg,kernel}.{0,1,2} bbox_head.mask_head.projection',
        masks=True,
    ),
    case(
        'YOLOX',
        **YOLOX,
        first='backbone.stem.conv.conv',
        last='bbox_head.multi_level_conv_{cls,reg,obj}.{0,1,2}',
    ),
    case(
        'CenterNet-deformable-and-transposed',
        'mmdet::centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py',
        first='backbone.conv1',
        last='bbox_head.{heatmap,wh,offset}_head.2',
        floats=r'neck\.deconv_layers\.[024]\.conv$',
    ),
    case(
        'Cascade-R-CNN',
        'mmdet::cascade_rcnn/cascade-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco.py',
        first='backbone.conv1',
        last='rpn_head.rpn_{cls,reg} roi_head.bbox_head.{0,1,2}.fc_{cls,reg}',
        model={**FEW_REGIONS, **{f'roi_head.bbox_head.{i}.fc_out_channels': 64 for i in range(3)}},
    ),
    case(
        'Mask-R-CNN',
        **MASK_RCNN,
        first='backbone.conv1',
        last='rpn_head.rpn_{cls,reg} roi_head.bbox_head.fc_{cls,reg} roi_head.mask_head.conv_logits',
    ),
    case(
        'DETR',
        'mmdet::detr/detr_r18_8xb2-500e_coco.py',
        products=2 * (1 + 2 * 2),
        first='backbone.conv1',
        last='bbox_head.fc_{cls,reg}',
        model=SMALL_DETR,
    ),
    case(
        'Deformable-DETR',
        'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
        products=2 * 2,
        first='backbone.conv1',
        last='bbox_head.cls_branches.0 bbox_head.reg_branches.0.4',  # the decoder layers share them
        model=SMALL_DETR,
    ),
    # ---- segmentation
    case(
        'SegFormer',
        'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
        products=2 * 8,
        first='backbone.layers.0.0.projection',
        last='decode_head.conv_seg',
    ),
    case(
        'DeepLabV3Plus-dilated',
        'mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py',
        first='backbone.stem.0',
        last='{decode,auxiliary}_head.conv_seg',
    ),
    case(
        'UNet',
        'mmseg::unet/unet-s5-d16_fcn_4xb4-40k_drive-64x64.py',
        first='backbone.encoder.0.0.convs.0.conv',
        last='{decode,auxiliary}_head.conv_seg',
        model={'backbone.base_channels': 8, 'decode_head.in_channels': 8, 'auxiliary_head.in_channels': 16},
    ),
    case(
        'BiSeNetV2-two-readers-of-the-image',
        'mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py',
        first='backbone.detail.detail_branch.0.0.conv backbone.semantic.stage1.conv_first.conv',
        last='decode_head.conv_seg auxiliary_head.{0,1,2,3}.conv_seg',
    ),
    case(
        'Segmenter-mask-as-a-product',
        'mmseg::segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512.py',
        products=2 * (3 + 2) + 1,
        first='backbone.patch_embed.projection',
        last='decode_head.{patch,classes}_proj',
        model={'backbone.num_layers': 3},
    ),
    case(
        'PIDNet-three-heads',
        'mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py',
        first='backbone.stem.0.conv',
        last='decode_head.{conv,p_cls,d_cls}_seg',
    ),
]


def parameters_of(layer):
    """The Parameters of a layer, the weight first; three projections of attention may share theirs."""
    if not isinstance(layer, Projection):
        return list(layer.parameters(recurse=False))
    (attention,) = layer.attention
    return list(attention.parameters(recurse=False))


def watch_gradients(model):
    """Name -> gradient of each layer's weight, filled by the next backward pass."""
    gradients = {}
    for name, layer in quant_layers(model).items():
        if layer.weight.requires_grad:
            parameters_of(layer)[0].register_hook(
                lambda gradient, name=name: gradients.update({name: gradient.clone()})
            )
    return gradients


def check_gradients(model, gradients):
    """Each trainable weight of a quantized layer has a finite gradient."""
    trainable = {name for name, layer in quant_layers(model).items() if layer.weight.requires_grad}
    assert trainable - not_reached(model) - set(gradients) == set()
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []


def not_reached(model):
    """Layers that calibration did not reach."""
    return {name for name, layer in quant_layers(model).items() if layer.bits == (32, 32)}


def plain(value):
    """What was predicted, as nested dicts and lists of tensors."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    if not hasattr(value, 'items'):
        return value
    return {key: plain(each) for key, each in value.items() if not key.startswith(('gt_', 'ignored_'))}


@pytest.fixture(autouse=True)
def mended_ssd(monkeypatch):
    """mmdet 3.5.1 reads an attribute that its SSD head does not have: without this it cannot predict, float or not."""
    monkeypatch.setattr(SSDHead, 'loss_cls', None, raising=False)


@pytest.mark.parametrize(('options', 'expected'), CASES)
def test_any_model(options, expected, tmp_path):
    runner = build(tmp_path, **options)
    gradients = watch_gradients(runner.model)
    runner.register_hook(At(settle, 'before_train', 'HIGHEST'))
    runner.train()
    check_gradients(runner.model, gradients)
    assert any(gradients[name].any() for name in expected['last'])
    stages = {module.stage for module in runner.model.modules() if isinstance(module, Quantizer)}
    assert stages - {Stage.FLOAT} == {Stage.QUANTIZE}
    check_layers(runner, **expected)
    result = predict(runner)
    check_result(result, **options)
    second = build(tmp_path, **options, seed=1)
    second.model.load_state_dict(runner.model.state_dict(), strict=True)
    assert same(plain(predict(second)), plain(result))


def check_layers(runner, first, last, floats, missed, products):
    """Each layer is quantized, or the table says why not; the first and the last ones have 8 bits."""
    model, layers = runner.model, quant_layers(runner.model)
    modules, rows = dict(model.named_modules()), {row.name: row for row in runner.report.layers}
    by_note = {note: {name for name in rows if rows[name].note.split(', ')[0] == note} for note in ('first', 'last')}
    assert by_note == dict(first=first, last=last)
    table = {line.split()[0]: line for line in layer_table(model, runner.report).splitlines() if line}
    assert set(rows) - set(layers) == {name for name in rows if re.search(floats, name)}
    reasons = 'float: .* has no quantized form|float: its weight is read outside of a call of the layer'
    assert all(re.match(reasons, rows[name].note) for name in set(rows) - set(layers))
    assert not_reached(model) == {name for name in layers if re.search(missed, name)}
    assert all('not reached by calibration' in table[name] for name in not_reached(model))
    for name in set(layers) - not_reached(model):
        assert (name, layers[name].bits) == (name, (8, 8) if name in first | last else (4, 4))
    bits = {row.name: factor_bits(model, row.name) for row in runner.report.products}
    assert {name for name, each in bits.items() if each != (8, 8)} == {r.name for r in runner.report.products if r.note}
    assert list(bits.values()).count((8, 8)) == products
    made_by_softmax = [quant for quant in activation_quantizers(model).values() if isinstance(quant, AttentionWeights)]
    assert all(quant.kind == 'unsigned' and quant.threshold_in_use() <= 1 for quant in made_by_softmax)
    assert len(made_by_softmax) == products // 2
    # Shared modules have several names; no name still leads to a float layer.
    left = {name for name, m in model.named_modules(remove_duplicate=False) if type(m) in QUANTIZED}
    assert left == {name for name in rows if 'outside of a call' in rows[name].note}
    # The table leaves out no weight.
    listed = {id(parameter) for name in rows for parameter in parameters_of(modules[name])}
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1 and id(p) not in listed}
    assert {name for name in matrices if not re.search(LOOKED_UP, name)} == set()


def test_images_without_boxes_and_without_proposals(tmp_path):
    runner = build(tmp_path, **MASK_RCNN)
    runner.register_hook(At(settle, 'before_train', 'HIGHEST'))
    runner.train()
    empty = Images('mmdet', 64, masks=True, boxes=0)
    gradients = watch_gradients(runner.model)
    runner.model.train()
    losses = runner.model.train_step(runner.val_dataloader.collate_fn([empty[0], empty[1]]), runner.optim_wrapper)
    assert all(value.isfinite().all() for value in losses.values())
    check_gradients(runner.model, gradients)
    assert not gradients['roi_head.mask_head.conv_logits'].any()  # it saw no region
    assert [key for key, value in runner.model.state_dict().items() if not value.isfinite().all()] == []
    assert all(len(sample.pred_instances) for sample in predict(runner))
    runner.model.rpn_head.test_cfg.min_bbox_size = 1000
    assert not any(len(sample.pred_instances) for sample in predict(runner))


def test_a_model_without_a_checkpoint_starts_with_finite_gradients(tmp_path):
    runner = build(tmp_path, **YOLOX)
    gradients = watch_gradients(runner.model)
    runner.train()
    check_gradients(runner.model, gradients)
