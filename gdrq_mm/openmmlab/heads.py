"""What we know about the heads of the three libraries: their last layers, and which heads are not deployed."""

from __future__ import annotations

import fnmatch

import torch.nn as nn

LAST_LAYERS: dict[str, tuple[str, ...]] = {
    # mmpretrain; where no head is listed here, the last layer is the one that runs last
    'ClsHead': ('fc', 'layers.head*', 'head', 'head.linear', 'head_dist.linear', 'dist_head', '*_cls_head'),
    'MultiLabelClsHead': ('fc', 'csra_heads.*.head'),
    # mmdet, dense heads
    'AnchorHead': ('conv_cls', 'conv_reg', 'rpn_cls', 'rpn_reg', 'retina_cls', 'retina_reg', 'atss_*', 'gfl_*'),
    'AnchorFreeHead': ('conv_cls', 'conv_reg', 'conv_centerness'),
    'GuidedAnchorHead': ('conv_loc', 'conv_shape'),
    'SABLRetinaHead': ('retina_cls', 'retina_bbox_cls', 'retina_bbox_reg'),
    'TOODHead': ('tood_cls', 'tood_reg', 'cls_prob_module.2', 'reg_offset_module.2'),
    'VFNetHead': ('vfnet_cls', 'vfnet_reg', 'vfnet_reg_refine'),
    'RepPointsHead': ('reppoints_cls_out', 'reppoints_pts_*_out'),
    'RTMDetHead': ('rtm_cls*', 'rtm_reg*', 'rtm_obj*', 'rtm_kernel*'),
    'SSDHead': ('cls_convs.*.[0-9]', 'reg_convs.*.[0-9]'),
    'YOLOV3Head': ('convs_pred.*',),
    'YOLOXHead': ('multi_level_conv_cls.*', 'multi_level_conv_reg.*', 'multi_level_conv_obj.*'),
    'YOLOFHead': ('cls_score', 'bbox_pred', 'object_pred'),
    'CenterNetHead': ('heatmap_head.2', 'wh_head.2', 'offset_head.2'),
    'CornerHead': ('*_heat.*.1.conv', '*_off.*.1.conv', '*_emb.*.1.conv', '*_shift.*.1.conv'),
    'DETRHead': ('fc_cls', 'fc_reg', '*cls_branches.*', '*reg_branches.*.4'),
    'DABDETRHead': ('fc_reg.layers.2',),
    'CLRHead': ('cls_layers', 'reg_layers', 'seg_decoder.conv'),
    'LinearReIDHead': ('fc_out', 'classifier'),
    # mmdet, masks without regions; where a mask is a product, the layers of both factors
    'CondInstBboxHead': ('controller',),
    'MaskFeatModule': ('conv_pred', 'conv_pred.conv', 'projection'),
    'MaskFormerHead': ('cls_embed', 'mask_embed.4', 'pixel_decoder.mask_feature'),
    'SOLOHead': ('conv_cls', 'conv_mask_list*', 'conv_kernel'),
    'YOLACTHead': ('conv_coeff',),
    'YOLACTProtonet': ('protonet.10', 'segm_branch.segm_conv'),
    # mmdet, heads for regions
    'BBoxHead': ('fc_cls*', 'fc_reg*'),
    'FCNMaskHead': ('conv_logits', 'fc_logits'),
    'MaskIoUHead': ('fc_mask_iou',),
    'GridHead': ('deconv2',),
    'FusedSemanticHead': ('conv_logits',),
    'GlobalContextHead': ('fc',),
    'BaseSemanticHead': ('conv_logits',),
    # mmseg; auxiliary heads too
    'BaseDecodeHead': ('conv_seg',),
    'DAHead': ('pam_conv_seg', 'cam_conv_seg'),
    'DDRHead': ('aux_cls_seg',),
    'EncHead': ('se_layer',),
    'KernelUpdateHead': ('fc_mask',),
    'PIDHead': ('p_cls_seg', 'd_cls_seg'),
    'SegmenterMaskTransformerHead': ('patch_proj', 'classes_proj'),
}
"""Head class -> patterns of its last layers, relative to the head; a subclass inherits them."""


TRAINING_ONLY = ('auxiliary_head',)
"""Parts of a model that are not deployed: mmseg's auxiliary heads."""


def last_layers(model: nn.Module) -> list[str]:
    """Names of the last layers of a model, as far as the classes of its heads are in LAST_LAYERS."""
    found: dict[str, None] = {}
    names = [name for name, _ in model.named_modules()]
    for head_name, head in model.named_modules():
        patterns = [p for cls in type(head).__mro__ for p in LAST_LAYERS.get(cls.__name__, ())]
        prefix = f'{head_name}.' if head_name else ''
        for name in names if patterns else []:
            if name.startswith(prefix) and any(fnmatch.fnmatchcase(name[len(prefix) :], p) for p in patterns):
                found[name] = None
    return list(found)
