"""Visual Genome's images, and the questions asked about them: GQA, and Visual Genome's own (VG-QA)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from oscar_common.tables import Ints, reading, strings
from oscar_extract.sources.coco import locate_coco
from oscar_extract.sources.inventory import Inventory
from oscar_extract.sources.place import SPLITS, Place, annotations, read_json, split_of
from oscar_extract.sources.tables import Annotations

GQA = r"(^|/)(train|val|testdev|test|challenge|submission)_(balanced|all)_questions(/[^/]*|[^/]*)\.json$"
VG_QA = r"(^|/)question_answers[^/]*\.json$"


def coco_twins(inventory: Inventory) -> dict[str, str]:
    """Return which "vg/2370799" is which "coco/139", as image_data.json says: half of the images are COCO's."""
    twins = {}
    for path in inventory.annotations:
        if path.name == "image_data.json":
            with reading(path, "--root"):
                for image in read_json(path, list):
                    if image.get("coco_id") is not None:
                        twins[f"vg/{image.get('image_id', image.get('id'))}"] = f"coco/{int(image['coco_id'])}"

    return twins


def read_gqa(place: Place) -> Annotations:
    """Read GQA's balanced questions, or where a split has none of these, all of it.

    Files of splits that are not wanted are read for their images alone.
    """
    images: dict[str, str] = {}
    texts: list[tuple[Any, ...]] = []
    for path, split in _gqa_files(place):
        with reading(path, "--root"):
            for number, question in read_json(path, dict, "imageId", "question", "answer").items():
                image = f"vg/{question['imageId']}"
                # An image of two splits counts as what keeps it out.
                images[image] = max(images.get(image, "train"), split, key=SPLITS.index)
                if split in place.splits and question.get("answer") is not None:
                    question_text = str(question["question"])
                    texts.append((image, "qa", "gqa", str(number), None, question_text, str(question["answer"])))

    listed = [("gqa", image, "", split) for image, split in images.items()]
    return annotations(listed, _locate(place, listed), texts)


def _gqa_files(place: Place) -> Iterator[tuple[Path, str]]:
    files = place.required(GQA, "train_balanced_questions.json or the like")
    for prefix in ("train", "val", "testdev", "test", "challenge", "submission"):
        of_prefix = [p for p in files if _called(p).startswith(f"{prefix}_")]
        balanced = [p for p in of_prefix if "_balanced_" in _called(p)]
        for path in balanced or of_prefix:
            yield path, split_of(prefix)


def _called(path: Path) -> str:
    """Return the file's name, or its folder's: train_all_questions/train_all_questions_0.json."""
    return path.name if "_questions" in path.name else path.parent.name


def read_vg_qa(place: Place) -> Annotations:
    """Read Visual Genome's question_answers.json, which has no splits of its own."""
    images: list[tuple[Any, ...]] = []
    texts: list[tuple[Any, ...]] = []
    for path in place.required(VG_QA, "question_answers.json"):
        with reading(path, "--root"):
            for entry in read_json(path, list, "question", "answer", "qa_id"):
                number = entry["id"] if "id" in entry else entry["image_id"]
                images.append(("vg-qa", f"vg/{number}", "", "train"))
                texts += [
                    (
                        f"vg/{number}",
                        "qa",
                        "vg-qa",
                        str(qa.get("qa_id", "")),
                        None,
                        str(qa["question"]),
                        str(qa["answer"]),
                    )
                    for qa in entry["qas"]
                ]

    return annotations(images, _locate(place, images), texts)


def _locate(place: Place, images: list[tuple[Any, ...]]) -> Ints:
    """Return the files of Visual Genome images: 2370799.jpg in VG_100K, VG_100K_2, or GQA's images; else COCO's own."""
    if not images:
        return np.zeros(0, np.int64)

    rows = place.locate(strings([i[1].removeprefix("vg/") for i in images]), place.inventory.stems, "vg")
    twins = coco_twins(place.inventory) if (rows < 0).any() else {}
    if twins:
        in_coco = locate_coco(place, [("", twins.get(image[1], ""), "", "") for image in images])
        rows = np.where(rows < 0, in_coco, rows)

    return rows
