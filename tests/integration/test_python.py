"""What others build on: the packages' public names, and the docs' examples in Python."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small_shards import P, make_samples, write_folder
from support import SHARDS, photo, run_here

import oscar_shards
from oscar_common import UsageError
from oscar_common.settings import Train
from oscar_extract import RefusedImage, detect_regions, open_detector
from oscar_train import load_checkpoint, load_tokenizer
from oscar_train.checkpoints import checkpoint
from oscar_train.checkpoints.init import build, open_init

ROOT = Path(__file__).parents[2]
PACKAGES = ("oscar_common", "oscar_shards", "oscar_extract", "oscar_train")
verify = partial(run_here, SHARDS, "verify")


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_are_there_and_are_those_that_type_checkers_see(name: str):
    package = importlib.import_module(name)
    assert package.__file__
    checked = next(
        node
        for node in ast.parse(Path(package.__file__).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    imported = {alias.name: node.module for node in imports for alias in node.names}
    assert sorted({*imported, "__version__"} & {*package.__all__}) == sorted(package.__all__)
    for public, module in imported.items():
        assert getattr(package, public) is getattr(importlib.import_module(str(module)), public)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize("name", PACKAGES)
def test_no_public_name_is_a_module_too(name: str):
    package = importlib.import_module(name)
    assert not {module.name for module in pkgutil.iter_modules(package.__path__)} & {*package.__all__}


def test_reading_shards_loads_no_torch(tmp_path: Path):
    write_folder(tmp_path / "shards", make_samples(5))
    code = f"""
import sys, {", ".join(PACKAGES)}
assert not {{"numpy", "pyarrow", "torch"}} & {{*sys.modules}}, "importing the packages is not free"
folder = oscar_shards.open_folder("shards")
row = folder.table.slice(0, 1).to_pylist()[0]
oscar_shards.read_features(folder.tars[0], row)
list(oscar_shards.read_samples(folder.tars[0]))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def blocks_of(page: str) -> list[str]:
    """The examples in Python on a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_every_block_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    photo("astronaut").save("photo.jpg")
    write_folder(tmp_path / "shards", make_samples())
    model, _ = build(open_init("random:tiny"), P, 1, classes=("matched", "polluted"))
    run = {**checkpoint.identity(Train()), "corpus": "abc"}
    checkpoint.save(tmp_path / "run", 7, run, model, torch.optim.SGD(model.parameters()), load_tokenizer(None))

    blocks = blocks_of("docs/python.md")
    assert len(blocks) == 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "person" in printed
    assert "matched" in printed
    assert verify("mine").returncode == 0


@pytest.mark.parametrize("page", ["README.md", "docs/shards.md"])
def test_blocks_that_read_shards_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "runs" / "shards", make_samples())
    (tmp_path / "shards").symlink_to("runs/shards")
    (tmp_path / "new").mkdir()
    names: dict[str, object] = {}
    for block in blocks_of(page):
        exec(compile(block, page, "exec"), names)


def test_a_folder_is_read_as_it_was_written(tmp_path: Path):
    samples = make_samples(21)
    detector = oscar_shards.DetectorRecord(
        name="d", preset="p", config="", weights="", weights_sha256="", classes=[], feature_dim=P
    )
    made = oscar_shards.write_folder(tmp_path / "out", iter(samples), detector, name="x", images_per_shard=8)
    assert (made.plan.num_images, made.plan.num_shards) == (21, 3)
    folder = oscar_shards.open_folder(tmp_path / "out")
    assert [tar.name for tar in folder.tars] == [f"x-00000{n}.tar" for n in range(3)]
    again = [sample for tar in folder.tars for sample in oscar_shards.read_samples(tar)]
    assert [s.key for s in again] == [s.key for s in samples]
    assert all(np.array_equal(a.regions.features, b.regions.features) for a, b in zip(again, samples, strict=True))
    for wrong in ({"name": "a b"}, {"images_per_shard": 0}):
        with pytest.raises(ValueError, match=r"^name|^images_per_shard"):
            oscar_shards.write_folder(tmp_path / "wrong", samples, detector, **wrong)
    with pytest.raises(UsageError, match="new folder"):
        oscar_shards.write_folder(tmp_path / "out", iter(samples), detector)
    unsafe = replace(samples[0], key="a.b")
    for refused, line in ((samples[:1] * 2, "another sample has it"), ([unsafe], "make_key"), ([], "no sample")):
        with pytest.raises(ValueError, match=line):
            oscar_shards.write_folder(tmp_path / line, refused, detector)
        with pytest.raises(UsageError, match=r"manifest\.json"):
            oscar_shards.open_folder(tmp_path / line)


def test_what_cannot_be_detected_or_loaded_is_one_line(tmp_path: Path):
    for names, line in (({"name": "nothing"}, "no such detectron2 config"), ({"preset": "vinvI"}, "did you mean")):
        with pytest.raises(UsageError, match=line):
            open_detector(**names, device="cpu")
    detector = open_detector(device="cpu")
    with pytest.raises(RefusedImage) as refusal:
        detect_regions(detector, tmp_path / "absent.jpg")
    assert refusal.value.reason == "unreadable"
    with pytest.raises(ValueError, match="uint8"):
        detect_regions(detector, np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match="min_boxes 3"):
        detect_regions(detector, np.zeros((8, 8, 3), np.uint8), min_boxes=3, max_boxes=2)
    with pytest.raises(UsageError):
        load_checkpoint(tmp_path, device="cpu")
