"""tools/train_builtin_detector.py trains, resumes, evaluates and exports; on two photos, so nothing is learned."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("detectron2")
pytest.importorskip("pycocotools")
photos = pytest.importorskip("skimage.data")

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "train_builtin_detector.py"
SHIPPED = ROOT / "extract" / "oscar_extract" / "builtin" / "model.safetensors"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i, (name, category, box) in enumerate(
        [("chelsea", 17, [90, 10, 300, 280]), ("coffee", 47, [150, 60, 280, 250])]
    ):
        photo = Image.fromarray(getattr(photos, name)())
        photo.save(folder / "images" / f"{name}.jpg")
        images.append({"id": i + 1, "file_name": f"{name}.jpg", "width": photo.width, "height": photo.height})
        place = {"bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        annotations.append({"id": i + 1, "image_id": i + 1, "category_id": category, **place})
    categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    for split in ("train", "eval"):
        content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        (folder / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def call(*arguments: object) -> str:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_training_resumes_and_its_export_is_complete(data: Path, tmp_path: Path) -> None:
    out, export = tmp_path / "out", tmp_path / "model.safetensors"
    common = ["--data", data, "--out", out, "--batch", 2, "--sizes", "128", "--size", 192]
    first = call(*common, "--init", SHIPPED, "--iterations", 2)
    assert "average precision" in first.lower()
    second = call(*common, "--iterations", 3, "--export", export)
    assert "resumed at iteration 2" in second
    trained, shipped = load_file(export), load_file(SHIPPED)
    assert {k: v.shape for k, v in trained.items()} == {k: v.shape for k, v in shipped.items()}
    assert {v.dtype for v in trained.values()} == {torch.float16}
    kept = [name for name in shipped if "bottom_up" in name or "proposal_generator" in name]
    assert all(torch.equal(trained[name], shipped[name]) for name in kept)
    evaluated = json.loads(call(*common, "--eval-only").splitlines()[-1])
    assert evaluated["AP-cat"] > 25
