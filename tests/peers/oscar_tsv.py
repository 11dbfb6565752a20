"""What microsoft/Oscar's pre-training reads of a folder, re-created slowly and literally, in words of our own.

Facts from oscar/datasets/oscar_tsv.py and oscar/utils/tsv_file.py: a file is opened as text; a line is found at the
offset that `.lineidx` has for its number; it is split at tabs and each field is stripped; ids are split at `_`, and the
last part is the image's (or the question's); every mismatch is an AssertionError or KeyError.
"""

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

IN_CHUNKS = ("googlecc", "sbu", "oi", "objects365", "tagoi")
IN_ONE_FILE = ("coco", "flickr30k", "gqa")


class Triple(NamedTuple):
    """An item of the data set: the two texts, and the region features, float32 [K, P + 6]."""

    image: str
    text_a: str
    text_b: str
    features: np.ndarray
    width: int
    height: int


class TextLines:
    """A TSV with its .lineidx."""

    def __init__(self, path: Path) -> None:
        with path.with_suffix(".lineidx").open() as index:
            self.offsets = [int(line.strip()) for line in index.readlines()]
        self.path = path

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, number: int) -> list[str]:
        with self.path.open() as file:
            file.seek(self.offsets[number])
            return [field.strip() for field in file.readline().split("\t")]


class Features:
    """A folder with features.tsv and imageid2idx.json."""

    def __init__(self, folder: Path) -> None:
        self.lines = TextLines(folder / "features.tsv")
        self.number = json.loads((folder / "imageid2idx.json").read_text())

    def read(self, image: str, width: int) -> np.ndarray:
        row = self.lines[self.number[image]]
        return np.frombuffer(base64.b64decode(row[-1]), np.float32).reshape(int(row[1]), width)


def read_triples(yaml_file: Path, data_dir: Path, width: int) -> list[Triple]:
    """All items in the corpus' order; `width` is img_feature_dim, P + 6."""
    content = yaml.safe_load(yaml_file.read_text())
    corpus = TextLines(yaml_file.parent / content["corpus_file"])
    opened = {n: _open(n, content, yaml_file.parent, data_dir) for n in content["corpus"].split("_")}
    sizes: dict[str, tuple[int, int]] = {}
    return [_triple(corpus[number], opened, sizes, width) for number in range(len(corpus))]


def _open(name: str, content: dict[str, Any], root: Path, data_dir: Path) -> dict[str, Any]:
    labels = root / content["image_label_path"][name]
    folder = data_dir / content["image_feature_path"][name]
    assert name in IN_CHUNKS + IN_ONE_FILE
    found = sorted(p.parent for p in folder.glob("*/features.tsv"))
    opened = {
        "labels": TextLines(labels / "predictions_gt.tsv"),
        "label": json.loads((labels / "imageid2idx.json").read_text()),
        "features": {p.name: Features(p) for p in found} if name in IN_CHUNKS else Features(folder),
    }
    if (labels / "QA_fileB.tsv").exists():
        opened["answers"] = TextLines(labels / "QA_fileB.tsv")
        opened["answer"] = json.loads((labels / "QA_qaid2idx.json").read_text())
    return opened


def _triple(row: list[str], opened: dict[str, Any], sizes: dict[str, tuple[int, int]], width: int) -> Triple:
    image, label = row[0].split("_"), row[1].split("_")
    assert image[0] == label[0]
    name = "googlecc" if image[0] == "cc" else image[0]
    dataset = opened[name]
    features = dataset["features"][image[-2]] if name in IN_CHUNKS else dataset["features"]
    assert image[-1] in features.number
    assert len(row[2]) != 0
    tags = dataset["labels"][dataset["label"][image[-1]]]
    said = json.loads(tags[1])
    if "qa" in label:
        assert image[-1] == label[-2]
        other = dataset["answers"][dataset["answer"][label[-1]]]
        text_b = " ".join(json.loads(other[1])["labels"])
    else:
        assert image[-1] == label[-1]
        other = tags
        text_b = " ".join(one["class"] for one in said["objects"])
    assert label[-1] == other[0]
    assert len(text_b) != 0
    size = said["image_w"], said["image_h"]
    assert sizes.setdefault(row[0], size) == size
    return Triple(row[0], row[2], text_b, features.read(image[-1], width), *size)
