"""Every preset against the extractor that it follows, re-created literally in `tests/peers` from the same state dict.

The photos are not those that the random networks' heads were fitted to.
"""

import dataclasses

import numpy as np
import pytest
import torch
from peers import bua, bua_d2, bua_r152, lxmert, vinvl
from peers.states import airsplay_from_caffe
from small_detectors import SIZES, small_detector
from support import photo

from oscar_extract import detect as detect_module
from oscar_extract.detect import detect, feature_maps, load_batch, make_input, pool
from oscar_extract.steps.presets import PRESETS
from oscar_extract.steps.selection import Selection

PEERS = {"bua": bua, "bua-r152": bua_r152, "lxmert": lxmert, "bua-d2": bua_d2, "vinvl": vinvl}
NATIVE = {
    "bua": "milvlg-caffe",
    "bua-r152": "milvlg-r152",
    "lxmert": "airsplay",
    "bua-d2": "milvlg-d2",
    "vinvl": "vinvl",
}


def image(name):
    """Photos of four shapes: landscape, portrait, one so wide that the long side decides, and a mere strip.

    In a strip many proposals come to the same cells under ROIPool, and so to the same score.
    """
    return {
        "cat": lambda: photo("chelsea"),
        "rocket": lambda: photo("rocket").crop((100, 0, 400, 427)),
        "wide": lambda: photo("chelsea").crop((0, 60, 451, 240)),
        "strip": lambda: photo("chelsea").crop((0, 100, 451, 130)),
    }[name]()


@pytest.fixture(scope="module")
def detectors(states, tmp_path_factory):
    return {
        preset: small_detector(family, tmp_path_factory.mktemp(family), states[family], preset)
        for preset, family in NATIVE.items()
    }


def found_by(detector, picture, selection=None):
    inputs = [make_input(detector, np.asarray(picture))]
    return detect(detector, inputs, selection or detector.preset.selection)[0]


def expected_of(preset, state, picture, selection):
    numbers = {
        "min_boxes": selection.min_boxes,
        "max_boxes": selection.max_boxes,
        "threshold": selection.score_threshold,
    }
    with torch.no_grad():
        found = PEERS[preset].extract(state, np.asarray(picture), **SIZES, **numbers)
    if preset == "bua-d2":  # MILVLG clips to the resized image, whose rounded width is a part of a pixel too wide
        found.boxes = found.boxes.clip(0, [*picture.size, *picture.size])
    return found


def assert_same(detector, ours, theirs):
    classes, attributes = detector.record.classes, detector.record.attributes
    assert len(ours.tags) == len(theirs.classes)
    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=0.01)
    assert ours.tags == [classes[c] for c in theirs.classes]
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-3)
    off = np.linalg.norm(ours.features.astype(np.float32) - theirs.features, axis=1)
    assert (off <= 1e-3 * np.linalg.norm(theirs.features, axis=1)).all()
    assert [[a.id for a in of] for of in ours.attributes] == [[a for a, _ in of] for of in theirs.attributes]
    assert all(a.name == attributes[a.id] for of in ours.attributes for a in of)
    probabilities = [p for of in theirs.attributes for _, p in of]
    assert [a.score for of in ours.attributes for a in of] == pytest.approx(probabilities, abs=1e-3)


@pytest.mark.parametrize("name", ["cat", "rocket", "wide", "strip"])
@pytest.mark.parametrize("preset", NATIVE)
def test_a_preset_finds_what_its_extractor_finds(detectors, states, preset, name):
    detector, picture = detectors[preset], image(name)
    ours = found_by(detector, picture)
    assert_same(detector, ours, expected_of(preset, states[NATIVE[preset]], picture, detector.preset.selection))
    assert len(set(ours.tags)) > 1


def pool_once(monkeypatch, *modules):
    """Let modules remember the features of boxes: most of the work, and the same for every selection."""
    for module in modules:
        monkeypatch.setattr(module, "pool", remembering(module.pool))


def remembering(pool):
    features = {}

    def remembered(network, maps, boxes, *more):
        key = torch.stack([*boxes]).numpy().tobytes()
        if key not in features:
            features[key] = pool(network, maps, boxes, *more)
        return features[key]

    return remembered


# The threshold decides, the least decides, the most decides.
SELECTIONS = [(1, 300, 0.2), (150, 300, 0.5), (36, 36, 0.2), (5, 20, 0.05)]


@pytest.mark.parametrize("preset", ["bua", "vinvl", "lxmert"])
def test_the_numbers_of_regions_are_kept_as_the_extractor_keeps_them(detectors, states, preset, monkeypatch):
    detector, picture = detectors[preset], image("cat")
    pool_once(monkeypatch, detect_module, PEERS[preset])
    for numbers in SELECTIONS:
        selection = Selection(**dict(zip(("min_boxes", "max_boxes", "score_threshold"), numbers, strict=True)))
        ours = found_by(detector, picture, selection)
        assert_same(detector, ours, expected_of(preset, states[NATIVE[preset]], picture, selection))


def test_bottom_up_regions_come_in_the_rpns_order_only_between_the_limits(detectors, monkeypatch):
    pool_once(monkeypatch, detect_module)
    detector, picture = detectors["bua"], image("cat")
    between = found_by(detector, picture, Selection(min_boxes=1, max_boxes=300, score_threshold=0.05))
    assert 10 < len(between.tags) < 300
    assert between.scores != sorted(between.scores, reverse=True)
    most = found_by(detector, picture, Selection(min_boxes=1, max_boxes=10, score_threshold=0.05))
    assert len(most.tags) == 10
    assert {tuple(b) for b in most.boxes.tolist()} < {tuple(b) for b in between.boxes.tolist()}


@pytest.mark.parametrize("preset", ["bua", "lxmert"])
def test_one_network_gives_one_result_from_caffes_files_and_from_the_ports(states, tmp_path, preset, monkeypatch):
    """The same weights under MILVLG's and under airsplay's names, in the order of anchors that each has."""
    caffe = states["milvlg-caffe"]
    (tmp_path / "caffe").mkdir()
    first = small_detector("milvlg-caffe", tmp_path / "caffe", caffe, preset)
    second = small_detector("airsplay", tmp_path, airsplay_from_caffe(caffe), preset, name="weights.pkl")
    propose_few(monkeypatch, first, second)
    one, other = (found_by(d, image("rocket")) for d in (first, second))
    np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
    assert one.tags == other.tags
    assert one.attributes == other.attributes
    np.testing.assert_allclose(one.features.astype(float), other.features.astype(float), rtol=2e-3, atol=2e-3)


def propose_few(monkeypatch, *detectors):
    """Let detectors propose a fifth of what their extractors do: what follows is most of the work."""
    for detector in detectors:
        monkeypatch.setattr(detector.model.proposal_generator, "post_nms_topk", {False: 60})


def turned(picture, count):
    """Images of one shape: the picture, mirrored, upside down, darker ..."""
    pixels = np.asarray(picture)
    views = [pixels, pixels[:, ::-1], pixels[::-1], pixels[::-1, ::-1]]
    return [np.ascontiguousarray(views[n % 4] // (1 + n // 4)) for n in range(count)]


@pytest.mark.parametrize("preset", NATIVE)
def test_a_batch_of_eight_gives_what_each_image_gives_alone(detectors, preset, monkeypatch):
    detector = detectors[preset]
    propose_few(monkeypatch, detector)
    inputs = [make_input(detector, pixels) for pixels in turned(image("cat"), 8)]
    selection = detector.preset.selection
    together = detect(detector, inputs, selection)
    assert len(together) == 8
    for number in (0, 3, 7):
        one, (alone,) = together[number], detect(detector, [inputs[number]], selection)
        assert one.tags == alone.tags
        np.testing.assert_allclose(one.boxes, alone.boxes, atol=0.01)
        np.testing.assert_allclose(one.scores, alone.scores, atol=1e-4)
        np.testing.assert_allclose(one.features.astype(float), alone.features.astype(float), rtol=2e-3, atol=2e-3)
        assert [[a.id for a in of] for of in one.attributes] == [[a.id for a in of] for of in alone.attributes]


@pytest.mark.parametrize("preset", NATIVE)
def test_bf16_stays_near(states, detectors, tmp_path, preset, monkeypatch):
    """The same regions by and large: most boxes have a twin of the same tag whose feature points the same way."""
    in_bf16 = small_detector(NATIVE[preset], tmp_path, states[NATIVE[preset]], preset, precision="bf16")
    propose_few(monkeypatch, detectors[preset], in_bf16)
    exact, rough = (found_by(detector, image("cat")) for detector in (detectors[preset], in_bf16))
    middle = lambda boxes: (boxes[:, :2] + boxes[:, 2:]) / 2  # noqa: E731
    apart = np.linalg.norm(middle(exact.boxes)[:, None] - middle(rough.boxes)[None], axis=2)
    twin = apart.argmin(axis=1)
    near = apart.min(axis=1) < 8
    assert near.mean() >= 0.6
    a, b = exact.features.astype(float)[near], rough.features.astype(float)[twin[near]]
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert np.median(cosine) > 0.99


def test_every_preset_says_what_it_keeps():
    for preset in PRESETS.values():
        assert 0 <= preset.selection.min_boxes <= preset.selection.max_boxes
        assert dataclasses.is_dataclass(preset)
    assert PRESETS["lxmert"].selection == Selection(min_boxes=36, max_boxes=36, score_threshold=0.0)


@pytest.mark.parametrize(("preset", "eps"), [("bua", 1e-5), ("vinvl", 0.0)])
def test_norms_have_the_extractors_epsilon(states, tmp_path, preset, eps):
    """With variances so small that it matters: a folded convolution is weight * gamma / sqrt(variance + epsilon)."""
    conv, norm = {
        "bua": ("backbone.stem.conv1", "backbone.stem.conv1.norm"),
        "vinvl": ("backbone.body.stem.conv1", "backbone.body.stem.bn1"),
    }[preset]
    state = dict(states[NATIVE[preset]])
    variance = state[f"{norm}.running_var"] = torch.full_like(state[f"{norm}.running_var"], 1e-5)
    stem = small_detector(NATIVE[preset], tmp_path, state).model.backbone.stem.conv1
    scale = state[f"{norm}.weight"] / (variance + eps).sqrt()
    torch.testing.assert_close(stem.weight, state[f"{conv}.weight"] * scale[:, None, None, None])
    torch.testing.assert_close(stem.bias, state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale)


def test_bua_d2_lowers_its_threshold_until_enough_come(detectors, monkeypatch):
    pool_once(monkeypatch, detect_module)
    detector, picture = detectors["bua-d2"], image("cat")
    few = found_by(detector, picture, Selection(min_boxes=0, max_boxes=100, score_threshold=0.9))
    more = found_by(detector, picture, Selection(min_boxes=40, max_boxes=100, score_threshold=0.9))
    assert len(few.tags) < 40 <= len(more.tags) <= 100
    assert more.scores[: len(few.tags)] == few.scores


@pytest.mark.parametrize("preset", NATIVE)
def test_no_proposals_give_no_regions(detectors, states, preset, monkeypatch):
    """An RPN that proposes nothing, in a batch of two; the job makes such images rejects."""
    detector = detectors[preset]
    rpn = detector.model.proposal_generator
    monkeypatch.setattr(rpn, "post_nms_topk", {False: 0})
    inputs = [make_input(detector, pixels) for pixels in turned(image("wide"), 2)]
    for found in detect(detector, inputs, detector.preset.selection):
        assert found.tags == found.scores == found.attributes == []
        assert (found.boxes.shape, found.features.shape) == ((0, 4), (0, 256))


@pytest.mark.parametrize("count", [1, 30, 31, 70])
@pytest.mark.parametrize("preset", NATIVE)
def test_a_box_has_one_feature_to_the_last_bit_wherever_it_stands(detectors, preset, count):
    """Under ROIPool two proposals may come to the same cells; of equal scores the first in the RPN's order must win."""
    detector = detectors[preset]
    maps = feature_maps(detector, load_batch(detector, [make_input(detector, np.asarray(image("cat")))]))
    features = pool(detector, maps, [torch.tensor([[30.0, 20.0, 110.0, 90.0]]).repeat(count, 1)])
    assert (features == features[0]).all()
    logits, _ = detector.model.roi_heads.box_predictor(features)
    assert (logits == logits[0]).all()
