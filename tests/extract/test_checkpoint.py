"""Published checkpoints: told by their names, all of them used, and refused with what is wrong."""

import re

import pytest
import torch
from peers.states import airsplay_from_caffe
from small_detectors import entry_of, save, small_detector

from oscar_common.errors import UsageError
from oscar_extract.detector import load_detector
from oscar_extract.network.families import AIRSPLAY, convert, family_of

FAMILIES = {
    "milvlg-caffe": "bua",
    "milvlg-r152": "bua-r152",
    "airsplay": "bua",
    "milvlg-d2": "bua-d2",
    "vinvl": "vinvl",
}
CELL_ANCHORS = "proposal_generator.anchor_generator.cell_anchors.0"


def refusal(family, folder, state, preset=None):
    with pytest.raises(UsageError) as error:
        small_detector(family, folder, state, preset)
    assert "\n" not in error.value.message
    return error.value.message


@pytest.mark.parametrize("name", ["weights.pth", "weights.bin", "weights.pkl", "weights.safetensors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_loads_with_the_preset_of_its_family(states, tmp_path, family, name):
    detector = small_detector(family, tmp_path, states[family], name=name)
    assert detector.preset.name == detector.record.preset == FAMILIES[family]
    assert detector.record.weights == name
    assert (len(detector.record.classes), len(detector.record.attributes)) == (1600, 400)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_out_and_nothing_made_up(states, family):
    """Every tensor of the file has a place of its own, but for a shared one that is stored twice."""
    told = family_of(states[family])
    assert told.name == family
    converted = convert(told, FAMILIES[family], states[family])
    twice = sum(name.startswith("attribute.feature_extractor.") for name in states[family])
    assert len(converted) == len(states[family]) - twice
    assert (twice > 0) == (family == "vinvl")
    for name in converted:
        assert told.ours(told.theirs(name)) == name


ATTRIBUTES = {
    "milvlg-caffe": "roi_heads.box_predictor.attr_linear2.weight",
    "milvlg-r152": "roi_heads.box_predictor.attr_linear2.weight",
    "airsplay": "roi_heads.box_predictor.attr_score.weight",
    "milvlg-d2": "roi_heads.attribute_predictor.attr_score.weight",
    "vinvl": "attribute.predictor.attr_score.weight",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_tensor_is_named_as_the_file_would_name_it(states, tmp_path, family):
    state = {name: t for name, t in states[family].items() if name != ATTRIBUTES[family]}
    assert f"missing {ATTRIBUTES[family]} [" in refusal(family, tmp_path, state)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_attribute_head_is_named(states, tmp_path, family):
    """As airsplay's faster_rcnn_from_caffe.pkl, which has none."""
    head = re.compile(r"cls_embed|attr_linear|fc_attr|attr_score|attribute")
    message = refusal(family, tmp_path, {n: t for n, t in states[family].items() if not head.search(n)})
    assert "missing" in message
    assert "attr" in message.split("does not fit")[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_shape_is_named(states, tmp_path, family):
    name = next(n for n in states[family] if n.endswith("cls_score.weight"))
    state = states[family] | {name: states[family][name][:-7]}
    assert f"{name} is [1594, 256], not [1601, 256]" in refusal(family, tmp_path, state)


@pytest.mark.parametrize(
    "name",
    ["objectness_logits.weight", "anchor_deltas.weight", "anchor_deltas.bias", "bbox_pred.bias", "cls_score.bias"],
)
@pytest.mark.parametrize("family", ["milvlg-caffe", "airsplay"])
def test_a_cut_tensor_that_would_be_reordered_is_named(states, tmp_path, family, name):
    full = next(n for n in states[family] if n.endswith(name))
    for cut in (states[family][full][:-1], states[family][full].new_zeros(())):
        assert full in refusal(family, tmp_path, states[family] | {full: cut})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_too_many_is_named(states, tmp_path, family):
    message = refusal(family, tmp_path, states[family] | {"mask_head.weight": torch.zeros(3)})
    assert "unused mask_head.weight [3]" in message


def test_another_preset_must_go_with_the_file(states, tmp_path):
    assert "which goes with bua or lxmert" in refusal("airsplay", tmp_path, states["airsplay"], "vinvl")
    assert "which goes with bua-d2" in refusal("milvlg-d2", tmp_path, states["milvlg-d2"], "bua")
    assert small_detector("airsplay", tmp_path, states["airsplay"], "lxmert").preset.name == "lxmert"


def test_vinvls_attribute_head_must_share_its_extractor(states, tmp_path):
    name = next(n for n in states["vinvl"] if n.startswith("attribute.feature_extractor."))
    other = states["vinvl"] | {name: states["vinvl"][name] + 1}
    assert f"{name} is not the tensor of roi_heads.box.feature_extractor." in refusal("vinvl", tmp_path, other)
    shared = {n: t for n, t in states["vinvl"].items() if not n.startswith("attribute.feature_extractor.")}
    small_detector("vinvl", tmp_path, shared)


def test_a_norm_of_milvlgs_152_is_named_where_the_file_has_it(states, tmp_path):
    """The last norm of its map is stored in the head, a block's in its convolutions."""
    for name in ("roi_heads.res5.0.norm.bias", "backbone.res3.1.conv2.norm.weight", "roi_heads.res5_bn.running_mean"):
        state = {n: t for n, t in states["milvlg-r152"].items() if n != name}
        assert f"missing {name} [" in refusal("milvlg-r152", tmp_path, state)


def test_anchors_come_from_the_preset_whatever_the_file_says(states, tmp_path):
    """As with MILVLG's files under a later detectron2, which took 4 to 32 pixels for the sizes."""
    wrong = states["milvlg-caffe"] | {CELL_ANCHORS: torch.full((12, 4), 7.0)}
    detector = small_detector("milvlg-caffe", tmp_path, wrong)
    (anchors,) = detector.model.proposal_generator.anchor_generator([torch.zeros(1, 1, 1, 1)])
    assert anchors.tensor[0].tolist() == [-38, -16, 53, 31]


def test_the_ports_channels_are_reordered_unless_the_file_shows_that_they_need_not(states):
    caffe = convert(family_of(states["milvlg-caffe"]), "bua", states["milvlg-caffe"])
    port = airsplay_from_caffe(states["milvlg-caffe"])
    name = "proposal_generator.rpn_head.anchor_deltas.weight"
    torch.testing.assert_close(convert(AIRSPLAY, "bua", port)[name], caffe[name])
    torch.testing.assert_close(convert(AIRSPLAY, "lxmert", port)[name], port[name])
    untouched = port | {CELL_ANCHORS: states["milvlg-caffe"][CELL_ANCHORS]}
    torch.testing.assert_close(convert(AIRSPLAY, "bua", untouched)[name], port[name])


def test_folding_two_logits_to_one_keeps_the_probability(states):
    state = states["milvlg-caffe"]
    folded = convert(family_of(state), "bua", state)
    name = "proposal_generator.rpn_head.objectness_logits."
    x = torch.randn(5, state[name + "weight"].shape[1])
    both = (x @ state[name + "weight"].flatten(1).T + state[name + "bias"]).view(5, 2, 12)
    one = x @ folded[name + "weight"].flatten(1).T + folded[name + "bias"]
    torch.testing.assert_close(one.sigmoid(), both.softmax(dim=1)[:, 1], rtol=1e-4, atol=1e-5)


def test_a_pickle_of_code_is_refused(tmp_path):
    save({"a": torch.zeros(1)}, tmp_path / "weights.pkl")
    (tmp_path / "weights.pkl").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    with pytest.raises(UsageError, match="only numpy arrays are allowed"):
        load_detector("vg", entry_of("airsplay", tmp_path, tmp_path / "weights.pkl"), "cpu")
    assert not (tmp_path / "executed").exists()
