"""COCO: captions_*.json and instances_*.json (2014 or 2017), images in train2014/ and so on; Karpathy's split."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oscar_common.tables import Ints, numbers, reading, strings
from oscar_extract.sources.place import Place, annotations, read_json, split_of
from oscar_extract.sources.splits import karpathy_texts
from oscar_extract.sources.tables import Annotations

FILES = r"(^|/)((captions|instances)_(train|val|test)|image_info_test)[^/]*\.json$"


def read_coco(place: Place) -> Annotations:
    """Read the images of all splits, and the captions of those that are wanted.

    Karpathy's split (dataset_coco.json), where it is there, decides over the annotation files' names: its `restval`
    images are of the training split, although they are in val2014. What no captions_*.json says, it says itself.
    """
    split = place.karpathy.get("coco", {})
    paths = place.annotations(FILES) if split else place.required(FILES, "captions_*.json or instances_*.json")
    images: list[tuple[Any, ...]] = []
    texts: list[tuple[Any, ...]] = []
    captioned: set[str] = set()

    for path in paths:
        with reading(path, "--root"):
            content = read_json(path, dict)
            of_file = split_of(path.name.partition("_")[2])
            listed = [(int(i["id"]), str(i.get("file_name", ""))) for i in content["images"]]
            images += [("coco", f"coco/{n}", name, split.get(f"coco/{n}", of_file)) for n, name in listed]
            texts += _captions(path, content, {n: split.get(f"coco/{n}", of_file) for n, _ in listed}, of_file, place)
            captioned |= {f"coco/{n}" for n, _ in listed if path.name.startswith("captions")}

    if split and not captioned.issuperset(split):
        more, of_more = karpathy_texts(place, "coco")
        images += [image for image in more if image[1] not in captioned]
        texts += [text for text in of_more if text[0] not in captioned]

    return annotations(images, locate_coco(place, images), texts)


def _captions(
    path: Path, content: Any, splits: dict[int, str], of_file: str, place: Place
) -> Iterator[tuple[Any, ...]]:
    if not path.name.startswith("captions"):
        return
    for caption in content["annotations"]:
        number = int(caption["image_id"])
        if splits.get(number, of_file) in place.splits:
            yield f"coco/{number}", "caption", "coco", str(caption.get("id", "")), str(caption["caption"]), None, None


def locate_coco(place: Place, images: list[tuple[Any, ...]]) -> Ints:
    """Return the files of images (dataset, "coco/139", file name or "", split): by that name, else by the number.

    A number is one of twelve digits, unless a folder's name says that the files are COCO's: 9.jpg may be anyone's.
    Photographs come before .png files, which may be COCO's segmentation maps.
    """
    inventory = place.inventory
    rows = place.locate(strings([i[2].rpartition("/")[2] or None for i in images]), inventory.names, "coco")
    names = strings([i[1].removeprefix("coco/") for i in images])
    long = pc.match_substring_regex(inventory.names, r"^(COCO_\w+_)?\d{12}(\.|$)")
    of_coco = pc.or_(long, pa.array(inventory.outer_family == "coco"))
    photograph = pc.match_substring_regex(inventory.names, r"(?i)\.jpe?g$")

    for which in (pc.and_(of_coco, photograph), of_coco):
        files = place.locate(names, pc.if_else(which, numbers(inventory.names), None), "coco")
        rows = np.where(rows < 0, files, rows)

    return rows
