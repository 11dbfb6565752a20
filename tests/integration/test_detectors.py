"""`oscar-extract` with the published detectors, as a user runs it: their files, their presets, their absence."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from safetensors.torch import save_file
from small_detectors import entry_of, save
from support import error_line, extract, oscar, photo, rejects

from oscar_common.settings import Detector as Entry
from oscar_extract.detect import detect, make_input
from oscar_extract.detector import build, configure, load_config, load_detector
from oscar_extract.network.download import zoo_config
from oscar_extract.steps.presets import PRESETS

NOWHERE = "http://127.0.0.1:9"  # the port that discards, where nothing listens


@pytest.fixture(scope="module")
def made(states, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path]:
    """Shards of four photos, by a small bottom-up attention network from a pickle in airsplay's names."""
    folder = tmp_path_factory.mktemp("vg")
    entry = entry_of("airsplay", folder, save(states["airsplay"], folder / "from_caffe_attr.pkl"))
    line = ["--images", photos / "size1", "--detector", entry.config, "--weights", entry.weights, "--device", "cpu"]
    line += ["--batch-size", 4, "--out", folder / "shards"]
    done = extract(*line)
    assert done.returncode == 0, done.stderr
    return line, folder / "shards"


def test_samples_carry_tags_and_attributes_of_visual_genome(made):
    shards = made[1]
    detector = json.loads((shards / "manifest.json").read_bytes())["detector"]
    assert (detector["preset"], detector["weights"]) == ("bua", "from_caffe_attr.pkl")
    assert (len(detector["classes"]), len(detector["attributes"])) == (1600, 400)
    samples = list(webdataset.WebDataset([str(p) for p in shards.glob("*.tar")], shardshuffle=False).decode())
    assert len(samples) == 4
    for sample in samples:
        content = sample["json"]
        assert 10 <= len(content["tags"]) == len(content["attributes"]) == len(sample["features.npy"]) <= 100
        assert set(content["tags"]) <= set(detector["classes"])
        for (attribute,) in content["attributes"]:
            assert attribute["name"] == detector["attributes"][attribute["id"]]
            assert 0 < attribute["score"] <= 1
    rows = [r for p in shards.glob("shard-??????.parquet") for r in pq.read_table(p).to_pylist()]
    by_key = {s["__key__"]: s["json"]["attributes"] for s in samples}
    assert {r["key"]: [[a["id"] for a in of] for of in r["attributes"]] for r in rows} == {
        key: [[a["id"] for a in of] for of in attributes] for key, attributes in by_key.items()
    }


def samples_of(shards: Path) -> dict[str, dict[str, bytes]]:
    """Every sample's members by its key, as bytes."""
    stream = webdataset.WebDataset([str(p) for p in sorted(shards.glob("*.tar"))], shardshuffle=False)
    return {s["__key__"]: {name: data for name, data in s.items() if name[0] != "_"} for s in stream}


def test_an_image_with_a_score_that_is_not_finite_is_a_reject_and_the_others_keep_their_bytes(states, made, tmp_path):
    """A weight that is NaN where attributes are told from one class: images without that class do not feel it."""
    before = samples_of(made[1])
    tags = [json.loads(sample["json"])["tags"] for sample in before.values()]
    rare = min(
        {tag for of_image in tags for tag in of_image}, key=lambda tag: sum(tag in of_image for of_image in tags)
    )
    classes = json.loads((made[1] / "manifest.json").read_bytes())["detector"]["classes"]
    broken = {name: tensor.clone() for name, tensor in states["airsplay"].items()}
    broken["roi_heads.box_predictor.cls_embedding.weight"][classes.index(rare)] = torch.nan

    out = tmp_path / "out"
    line = [*made[0], "--out", out, "--weights", save(broken, tmp_path / "broken.pkl")]
    done = extract(*line)
    assert done.returncode == 0, done.stderr
    refused = rejects(out)
    assert {(r["reason"], r["message"]) for r in refused} == {("not-finite", "a score is not finite")}
    assert f"not-finite: {len(refused)}" in done.stdout
    after = samples_of(out)
    assert after
    assert after == {key: before[key] for key in after}
    gone = [json.loads(sample["json"])["image"]["path"] for key, sample in before.items() if key not in after]
    assert sorted(gone) == sorted(r["path"] for r in refused)

    assert "images were refused" in error_line(extract(*line, "--retry-rejects", "--max-reject-fraction", 0))
    assert (rejects(out), samples_of(out)) == (refused, after)


def test_with_a_weight_that_is_not_finite_every_image_is_a_reject_and_the_job_exits_1(states, made, tmp_path):
    broken = {name: tensor.clone() for name, tensor in states["airsplay"].items()}
    broken["backbone.stem.conv1.weight"][0, 0, 0, 0] = torch.nan
    done = extract(*made[0], "--out", tmp_path / "out", "--weights", save(broken, tmp_path / "broken.pkl"))
    assert done.returncode == 1
    assert "4 of 4 images were refused" in error_line(done)
    assert [r["reason"] for r in rejects(tmp_path / "out")] == ["not-finite"] * 4


@pytest.mark.parametrize(
    ("change", "named"),
    [(["--preset", "lxmert"], "preset lxmert"), (["--precision", "bf16"], "precision fp32, this is bf16"),
     (["--max-boxes", 50], "max_boxes 100, this is 50"), (["--preset", "vinvl"], "goes with bua or lxmert")],
)  # fmt: skip
def test_other_numerics_never_mix_with_what_is_there(made, change, named):
    done = extract(*made[0], *change)
    assert done.returncode == 2
    assert named in error_line(done)


def test_offline_the_hubs_file_is_named_with_its_place(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    arguments = ("--images", photos, "--out", tmp_path / "out", "--detector", "vg-r101")
    line = [sys.executable, "-m", "oscar_extract", *map(str, arguments)]
    done = subprocess.run(line, text=True, capture_output=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    line = error_line(done)
    assert f"fetch {NOWHERE}/unc-nlp/frcnn-vg-finetuned/resolve/main/pytorch_model.bin where there is a network" in line
    assert "--weights FILE" in line
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_hubs_cache_is_taken_without_network(states, tmp_path, monkeypatch):
    """Laid out as the hub's client does; the network is refused."""
    import huggingface_hub.constants

    cached = tmp_path / "models--owner--name"
    (cached / "snapshots/abc").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    save(states["airsplay"], cached / "snapshots/abc/pytorch_model.bin")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", None)
    entry = entry_of("airsplay", tmp_path, "hf://owner/name/pytorch_model.bin")
    assert load_detector("mine", entry, "cpu").preset.name == "bua"


def test_vinvl_asks_for_its_files(photos, tmp_path):
    line = ["--images", photos, "--out", tmp_path / "out", "--detector", "vinvl-x152"]
    assert "give one with --weights FILE" in error_line(extract(*line))
    torch.save({"model": {"backbone.body.stem.conv1.weight": torch.zeros(64, 3, 7, 7)}}, tmp_path / "vinvl.pth")
    done = extract(*line, "--weights", tmp_path / "vinvl.pth")
    assert done.returncode == 2
    assert "it has 1594 classes" in error_line(done)
    assert "--classes FILE" in error_line(done)


ZOO = {"COCO-Detection/faster_rcnn_R_50_C4_1x": 2048, "COCO-Detection/faster_rcnn_R_50_FPN_1x": 1024}


@pytest.mark.parametrize("name", ZOO)
def test_detectron2s_model_zoo_by_name(tmp_path, name):
    """With random weights, and small inputs by way of a config that extends the zoo's."""
    base = zoo_config(name)
    config = tmp_path / "small.yaml"
    small = "INPUT: {MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 160}\nMODEL: {RPN: {POST_NMS_TOPK_TEST: 20}}\n"
    config.write_text(f"_BASE_: {base}\n{small}")
    model = build(name, configure(load_config(name, str(config)), PRESETS["detectron2"], "cpu"))
    for module_name, module in model.named_modules():
        if module_name.endswith("conv3.norm"):
            module.weight.fill_(0.2)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "weights.safetensors")
    detector = load_detector(name, Entry(config=str(config), weights=str(tmp_path / "weights.safetensors")), "cpu")
    (found,) = detect(detector, [make_input(detector, np.asarray(photo("coffee")))], detector.preset.selection)
    assert detector.record.classes[:2] == ["person", "bicycle"]
    assert found.features.shape == (len(found.tags), ZOO[name])
    assert len(found.tags) > 0
    assert np.isfinite(found.features.astype(np.float32)).all()
    assert found.attributes == []


def test_a_name_that_is_nearly_right_is_suggested(photos, tmp_path):
    done = extract("--images", photos, "--out", tmp_path / "out", "--detector", "vg-r102")
    assert done.returncode == 2
    assert "vg-r101" in error_line(done)


def test_compiling_without_a_compiler_is_one_line(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = extract("--images", photos, "--out", tmp_path / "out", "--compile")
    assert done.returncode == 2
    assert "needs a C++ compiler" in error_line(done)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_compiled_network_finds_the_same(photos, tmp_path):
    """In photos of several shapes; it takes a minute to compile."""
    for out, flags in ((tmp_path / "plain", ()), (tmp_path / "compiled", ("--compile",))):
        done = oscar("oscar-extract", "--images", photos, "--out", out, *flags, timeout=900)
        assert done.returncode == 0, done.stderr
    plain, compiled = (
        {s["__key__"]: s for s in webdataset.WebDataset(str(d / "shard-000000.tar"), shardshuffle=False).decode()}
        for d in (tmp_path / "plain", tmp_path / "compiled")
    )
    assert plain.keys() == compiled.keys()
    for key, sample in plain.items():
        assert sample["json"]["tags"] == compiled[key]["json"]["tags"]
        np.testing.assert_allclose(sample["boxes.npy"], compiled[key]["boxes.npy"], atol=0.05)
