"""Presets: each is one extractor's way from pixels to regions. docs/numerics.md has every step with its source.

A preset says everything that changes a feature apart from the weights, the depth of the network and the input's size,
which the detectron2 config says: its other keys a preset overrides, the anchors above all.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from oscar_extract.steps.attributes import describe_caffe, describe_lxmert, describe_vinvl
from oscar_extract.steps.proposals import Proposals, propose_caffe, propose_detectron2, propose_maskrcnn_benchmark
from oscar_extract.steps.selection import (
    Candidates,
    Kept,
    Selection,
    select_bua_d2,
    select_caffe,
    select_detectron2,
    select_lxmert,
    select_vinvl,
)

RATIOS = [[0.5, 1.0, 2.0]]
C4: dict[str, Any] = {
    "INPUT.FORMAT": "BGR",
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.RESNETS.OUT_FEATURES": ["res4"],
    "MODEL.PROPOSAL_GENERATOR.NAME": "RPN",
    "MODEL.RPN.IN_FEATURES": ["res4"],
    "MODEL.RPN.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 300,
    "MODEL.RPN.NMS_THRESH": 0.7,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": RATIOS,
    "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
    "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False,
}
BOTTOM_UP: dict[str, Any] = C4 | {  # the network of bottom-up attention, as Caffe and the LXMERT port build it
    "MODEL.PIXEL_MEAN": [102.9801, 115.9465, 122.7717],
    "MODEL.BACKBONE.NAME": "build_caffe_resnet_backbone",
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "MODEL.RESNETS.RES5_DILATION": 2,
    "MODEL.RPN.CONV_DIMS": [512],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[64, 128, 256, 512]],
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 14,
}


BUA: dict[str, Any] = BOTTOM_UP | {
    "MODEL.ANCHOR_GENERATOR.NAME": "CaffeAnchorGenerator",
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 16,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.3,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The steps of one extractor, and the detectron2 config keys (`fixed`) that they go with."""

    name: str
    selection: Selection  # what the extractor keeps by default
    fixed: dict[str, Any] = field(default_factory=dict)
    batch_norm_eps: float = 1e-5
    resize: str = "detectron2"
    propose: Callable[..., Proposals] = propose_detectron2
    select: Callable[[Any, Candidates, Selection], Kept] = select_detectron2
    pool_again: bool = False  # a region's feature is pooled in its final box, not in the proposal
    describe: Callable[..., tuple[Tensor, Tensor]] = describe_caffe


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="detectron2",
            selection=Selection(min_boxes=10, max_boxes=100, score_threshold=0.2),
            pool_again=True,
        ),
        Preset(  # Anderson et al.'s Caffe code, and MILVLG's caffe mode, which reads the same weights
            name="bua",
            selection=Selection(min_boxes=10, max_boxes=100, score_threshold=0.2),
            fixed=BUA,
            resize="caffe",
            propose=propose_caffe,
            select=select_caffe,
        ),
        Preset(  # MILVLG's better one, of pre-activation blocks: the same steps about another network
            name="bua-r152",
            selection=Selection(min_boxes=100, max_boxes=100, score_threshold=0.2),
            fixed=BUA
            | {
                "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
                "MODEL.BACKBONE.NAME": "build_preactivation_resnet_backbone",
                "MODEL.RESNETS.STRIDE_IN_1X1": False,
                "MODEL.RESNETS.RES5_DILATION": 1,
                "MODEL.ROI_HEADS.NAME": "PreActivationRes5ROIHeads",
            },
            batch_norm_eps=2e-5,
            resize="caffe",
            propose=propose_caffe,
            select=select_caffe,
        ),
        Preset(  # airsplay/py-bottom-up-attention
            name="lxmert",
            selection=Selection(min_boxes=36, max_boxes=36, score_threshold=0.0),
            fixed=BOTTOM_UP
            | {
                "MODEL.ANCHOR_GENERATOR.NAME": "DefaultAnchorGenerator",
                "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 0,
                "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
            },
            select=select_lxmert,
            describe=describe_lxmert,
        ),
        Preset(  # MILVLG's d2 mode, another network
            name="bua-d2",
            selection=Selection(min_boxes=0, max_boxes=100, score_threshold=0.05),
            fixed=C4
            | {
                "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
                "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
                "MODEL.ANCHOR_GENERATOR.NAME": "DefaultAnchorGenerator",
                "MODEL.ANCHOR_GENERATOR.SIZES": [[32, 64, 128, 256, 512]],
                "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 0,
                "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.5,
                "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2",
                "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
                "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
                "MODEL.ROI_ATTRIBUTE_HEAD.BACKGROUND": False,
            },
            resize="caffe",
            select=select_bua_d2,
        ),
        Preset(  # microsoft/scene_graph_benchmark as its README extracts: NMS_FILTER 1, IGNORE_BOX_REGRESSION
            name="vinvl",
            selection=Selection(min_boxes=10, max_boxes=100, score_threshold=0.2),
            fixed=C4
            | {
                "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
                "MODEL.ANCHOR_GENERATOR.NAME": "CaffeAnchorGenerator",
                "MODEL.ANCHOR_GENERATOR.SIZES": [[32, 64, 128, 256, 512]],
                "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 0,
                "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.3,
                "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign",
                "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 14,
                "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 0,
                "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
            },
            batch_norm_eps=0.0,
            resize="maskrcnn-benchmark",
            propose=propose_maskrcnn_benchmark,
            select=select_vinvl,
            describe=describe_vinvl,
        ),
    )
}
