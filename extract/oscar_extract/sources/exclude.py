"""Lists of images to keep out: --exclude."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from oscar_common.captions import IMAGE_COLUMNS
from oscar_common.errors import UsageError
from oscar_common.tables import last, numbers, reading, stems, text_array
from oscar_common.text_files import read_json, read_text, split_lines, table_rows
from oscar_extract.sources.place import split_of

FLAG = "--exclude"


def read_excluded(path: Path) -> list[str]:
    """Return the names of a list: a line each (the first column of a .csv or .tsv), or a JSON file's.

    Of Karpathy's splits, and of lists by split, that is the val and test images; of COCO annotations all images.

    Raises:
        UsageError: no such file, or not of these forms.
    """
    with reading(path, FLAG):
        if (form := path.suffix.lower()) == ".json":
            return _json(read_json(path, FLAG))
        if form in (".csv", ".tsv"):
            names = [row[0].strip().strip('"') for row in table_rows(path, FLAG, ragged=True)]
        else:
            names = [line.strip() for line in split_lines(read_text(path, FLAG))]

    if not any(names):
        raise UsageError(f"{FLAG} {path}: no name in it; give a list of images, one a line")

    return [name for name in names if name]


def _json(content: Any) -> list[str]:
    if isinstance(content, dict) and "images" in content:
        names = []
        for image in content["images"]:
            if "split" in image:  # Karpathy's
                if split_of(str(image["split"])) == "train":
                    continue
                names.append(f"coco/{int(image['cocoid'])}" if "cocoid" in image else str(image["filename"]))
            else:
                names.append(str(image.get("file_name") or image["id"]))

        return names

    if isinstance(content, dict):
        train_keys = [k for k in content if {"val", "test"} & content.keys() and split_of(k) == "train"]
        content = [
            name
            for key, names in content.items()
            for name in (names if isinstance(names, list) else [names])
            if key not in train_keys
        ]

    return [str(_name(entry)) for entry in content]


def _name(entry: Any) -> Any:
    """Return an entry of a list, or of an object in it what names the image."""
    if not isinstance(entry, dict):
        return entry
    if not (named := [entry[c] for c in IMAGE_COLUMNS if c in entry]):
        raise ValueError(f"an entry has none of {', '.join(IMAGE_COLUMNS)}")
    return named[0]


def are_named(names: list[str], images: pa.Array, paths: pa.Array, called: pa.Array) -> npt.NDArray[np.bool_]:
    """Return which images are named, bool [N], given each one's "source/id", its path, and what its dataset calls it.

    A name is "source/id", an id, a path, a URL, a file's name with or without extension, or COCO's number. A bare
    number names the image of that id in every source: too many is the lesser evil, and `source/id` is exact.
    """
    name_array = text_array(names, pa.string())
    plain = pc.coalesce(stems(name_array), name_array)
    ids = pc.replace_substring_regex(images, r"^[^/]*/", "")
    is_named = np.zeros(len(images), bool)
    coco = pc.starts_with(images, "coco/")
    digits = pc.if_else(coco, ids, None)

    for column, values in (
        (images, name_array),
        (ids, name_array),
        (paths, name_array),
        (called, name_array),
        (last(paths), name_array),
        (stems(paths), plain.filter(pc.invert(pc.match_substring(name_array, "/")))),
        (
            digits,
            numbers(name_array.filter(pc.match_substring_regex(name_array, r"^(.*/)?(COCO_\w+_)?\d{12}(\.\w+)?$"))),
        ),
    ):
        is_named |= pc.is_in(column, value_set=values, skip_nulls=True).to_numpy(zero_copy_only=False)

    return is_named
