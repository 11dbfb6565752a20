"""Flickr30k (and Flickr8k, which has its form): a token file, a folder of images, and lists of the splits if there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oscar_common.captions import PATH_COLUMNS
from oscar_common.tables import reading, stems, strings
from oscar_common.text_files import csv_rows, lines
from oscar_extract.sources.place import Place, annotations, split_of
from oscar_extract.sources.splits import karpathy_texts
from oscar_extract.sources.tables import Annotations

TOKENS = r"(?i)(^|/)((results|flickr\d+k)[^/]*\.token|flickr\d+k\.token\.txt|results(_20130124)?\.csv|captions\.txt)$"
LISTS = r"(?i)(^|/)((flickr_?\d+k[._])?(train|val|dev|test)(images)?)\.txt$"


def read_flickr30k(place: Place) -> Annotations:
    """Read the captions, five an image.

    Splits are those of Karpathy's dataset_flickr30k.json, or of lists train.txt, val.txt and test.txt (Flickr30k
    Entities; Flickr8k's names are known, too). Without any, every image is of the training split.
    """
    split = place.karpathy.get("flickr30k", {}) | _lists(place)
    paths = sorted(place.annotations(TOKENS), key=lambda path: ".token" not in path.name)
    images: dict[str, str] = {}
    texts: list[tuple[Any, ...]] = []

    for path in paths[:1]:  # the others hold the same captions in another form
        with reading(path, "--root"):
            for name, number, caption in _rows(path):
                image = f"flickr30k/{_stem(name)}"
                images[image] = name
                if split.get(image, "train") in place.splits:
                    texts.append((image, "caption", "flickr30k", f"{name}#{number}", caption, None, None))

    listed = [("flickr30k", image, name, split.get(image, "train")) for image, name in images.items()]
    if not paths:
        listed, texts = karpathy_texts(place, "flickr30k")

    if not listed:
        place.required(TOKENS, "results_20130124.token, results.csv or dataset_flickr30k.json")

    rows = place.locate(strings([_stem(i[2]) for i in listed]), stems(place.inventory.names), "flickr30k")
    return annotations(listed, rows, texts)


def _stem(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[0] or name.rpartition("/")[2]


def _rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (image, number, caption) of `1000092795.jpg#0⇥Two young guys ...` or of a table with those three."""
    if ".token" in path.name:
        for line in lines(path, "--root"):
            name, _, caption = line.strip().partition("\t")
            if caption:
                image, _, number = name.rpartition("#")
                yield image or name, number, caption.strip()
        return

    for count, row in enumerate(_table(path)):
        cells = [cell.strip() for cell in row]
        if count == 0 and cells and cells[0].lower() in PATH_COLUMNS:
            continue

        if len(cells) == 3:
            yield cells[0], cells[1], cells[2]
        elif len(cells) == 2:
            yield cells[0], str(count), cells[1]


def _table(path: Path) -> Iterator[list[str]]:
    """Yield the rows of a table with bars and without quoting, as Kaggle's results.csv is, or of CSV."""
    if "|" in next(lines(path, "--root"), ""):
        for line in lines(path, "--root"):
            cells = line.split("|", 2)
            if len(cells) == 2 and (start := re.match(r"\s*(\d+)\s+(?=\S)", cells[1])):
                cells = [cells[0], start[1], cells[1][start.end() :]]  # as in line 19999 of Kaggle's results.csv
            yield cells
        return

    width = 0
    for _, row in csv_rows(path, "--root"):
        width = width or len(row)
        # The caption is the last column, and has its commas without quotes in some copies
        yield row if len(row) <= width else [*row[: width - 1], ",".join(row[width - 1 :])]


def _lists(place: Place) -> dict[str, str]:
    split = {}
    for path in place.annotations(LISTS):
        with reading(path, "--root"):
            name = re.split(r"(?i)flickr_?\d+k[._]", path.stem)[-1].lower().removesuffix("images")
            for line in filter(None, map(str.strip, lines(path, "--root"))):
                stem = line.rpartition("/")[2]
                split[f"flickr30k/{stem.rpartition('.')[0] or stem}"] = split_of(name)

    return split
