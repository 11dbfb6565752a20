"""Numbers of the network that are not finite make an image a reject of that name; nothing of it is stored."""

import numpy as np
import pytest
import torch
from small_detectors import small_detector
from support import photo

from oscar_common.sample import ImageRecord, Sample
from oscar_extract.detect import make_input
from oscar_extract.out_of_memory import Limit
from oscar_extract.plan import PlannedImage
from oscar_extract.shard_job import Equipment, Loaded, detect_batch

FAMILIES = {
    "bua": "milvlg-caffe",
    "bua-r152": "milvlg-r152",
    "lxmert": "airsplay",
    "bua-d2": "milvlg-d2",
    "vinvl": "vinvl",
}


def detector_of(preset, states, folder, proposals=20):
    """A small detector that proposes few regions, which spares time."""
    detector = small_detector(FAMILIES[preset], folder, states[FAMILIES[preset]], preset)
    detector.model.proposal_generator.post_nms_topk = {False: proposals}
    return detector


def found_in(detector, *names):
    """Samples and rejects of photos in one batch, by the path that the photo is given."""
    batch = []
    for name in names:
        pixels = np.asarray(photo(name).resize((240, 180)))
        planned = PlannedImage(key=name, source="", id=name, path=name, also=[], texts=[], root=0)
        record = ImageRecord(source="", id=name, path=name, width=240, height=180, sha256="")
        batch.append(Loaded(planned=planned, input=make_input(detector, pixels), record=record))
    tools = Equipment(detector=detector, selection=detector.preset.selection, limit=Limit(images=len(batch)))
    return dict(zip(names, detect_batch(tools, batch), strict=True))


PARTS = {
    "backbone": lambda model: next(t for n, t in model.backbone.named_parameters() if n.endswith("conv1.weight")),
    "objectness": lambda model: model.proposal_generator.rpn_head.objectness_logits.weight,
    "proposed boxes": lambda model: model.proposal_generator.rpn_head.anchor_deltas.bias,
    "res5": lambda model: next(t for n, t in model.roi_heads.res5.named_parameters() if n.endswith("conv3.weight")),
    "classes": lambda model: model.roi_heads.box_predictor.cls_score.bias,
    "boxes": lambda model: model.roi_heads.box_predictor.bbox_pred.bias,
    "attributes": lambda model: model.roi_heads.attribute_head.score.bias,
}


@pytest.mark.parametrize("preset", FAMILIES)
def test_weights_that_are_not_finite_make_every_image_a_reject_of_that_name(preset, states, tmp_path):
    names = ("chelsea", "coffee")
    detector = detector_of(preset, states, tmp_path)
    assert all(isinstance(item, Sample) for item in found_in(detector, *names).values())
    for part, weights_of in PARTS.items():
        weights = weights_of(detector.model)
        sound = weights.detach().clone()
        for value in (torch.nan, torch.inf) if part != "proposed boxes" else (torch.nan,):  # infinite ones are clipped
            with torch.no_grad():
                weights[:] = value
            reasons = {name: getattr(item, "reason", item) for name, item in found_in(detector, *names).items()}
            assert reasons == dict.fromkeys(names, "not-finite"), (part, value)
        with torch.no_grad():
            weights[:] = sound


def test_a_feature_too_large_for_float16_refuses_its_image_and_leaves_the_others_as_they_are(states, tmp_path):
    """A bias brings a feature that no class looks at so near to the limit that one of two images passes it."""
    detector, names = detector_of("bua", states, tmp_path), ("chelsea", "coffee")
    heads = detector.model.roi_heads
    bias = heads.res5[-1].conv3.bias
    with torch.no_grad():
        for layer in (heads.box_predictor.cls_score, heads.box_predictor.bbox_pred, heads.attribute_head.hidden):
            layer.weight[:, 0] = 0
        bias[0] = 1000
    before = found_in(detector, *names)
    most = {name: float(item.regions.features[:, 0].max()) for name, item in before.items()}
    low, high = sorted(most, key=lambda name: most[name])
    assert most[low] < most[high]
    with torch.no_grad():
        bias[0] += 65520 - (most[low] + most[high]) / 2
    found = found_in(detector, *names)
    assert isinstance(found[low], Sample)
    assert found[high].reason == "not-finite"
    assert found[high].message == "a feature is not finite, or too large for float16, whose largest is 65504"
    assert np.array_equal(found[low].regions.features[:, 1:], before[low].regions.features[:, 1:])
    assert found[low].regions.scores == before[low].regions.scores


@pytest.mark.parametrize("preset", ["bua", "lxmert", "vinvl"])
def test_where_nothing_is_proposed_and_all_is_finite_there_is_no_region(preset, states, tmp_path):
    detector = detector_of(preset, states, tmp_path, proposals=0)
    assert {item.reason for item in found_in(detector, "chelsea", "coffee").values()} == {"no-regions"}
