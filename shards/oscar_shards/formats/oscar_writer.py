"""Samples to a folder that microsoft/Oscar's own OscarTSVDataset and retrieval code read."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from oscar_common.errors import OperationError
from oscar_common.sample import Sample, Text
from oscar_shards.formats.fields import encode, free_id, plain
from oscar_shards.formats.oscar_corpus import FEATURES, LABELS, QA, YAML
from oscar_shards.formats.oscar_tsv import positions

CORPUS = "corpus.tsv"
IDS, ANSWER_IDS = "imageid2idx.json", "QA_qaid2idx.json"
CHUNKED = ("googlecc", "sbu", "oi", "objects365", "tagoi")  # the reader looks for their features in chunks' folders
KNOWN = ("coco", "flickr30k", "gqa", *CHUNKED)  # it has no other names
OTHERS = "coco"  # what sources of other names are put to
CHUNK = 250_000  # images


def files_beside(features: Iterable[str]) -> set[str]:
    """Return the names of all files that an export may have whose images are in some files of features."""
    places = [Path(name).parent for name in features]
    tables = [Path(CORPUS), *(place / name for place in places for name in (FEATURES, LABELS[1]))]
    tables += [Path(place.parts[0], name) for place in places for name in (LABELS[0], QA)]
    side_files = [Path(YAML), *(place / IDS for place in places)]
    side_files += [Path(place.parts[0], name) for place in places for name in (IDS, ANSWER_IDS)]
    return {str(path) for path in [*side_files, *tables, *(table.with_suffix(".lineidx") for table in tables)]}


class TsvFile:
    """A TSV being written, and its `.lineidx`: the offset of each line, one a line."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._file, self._index = (stack.enter_context(p.open("wb")) for p in (path, path.with_suffix(".lineidx")))
        self._offset = 0
        self.rows = 0

    def write(self, *fields: bytes) -> int:
        """Write a row and return its number."""
        self._index.write(b"%d\n" % self._offset)
        self._offset += self._file.write(b"\t".join(fields) + b"\n")
        self.rows += 1
        return self.rows - 1

    def close(self) -> None:
        """Close both."""
        self._file.close()
        self._index.close()


class _Dataset:
    """The files of one dataset: labels and answers, and the features, which the reader wants in chunks from some."""

    def __init__(self, folder: Path, chunked: bool, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.chunked = chunked
        self.chunk = -1
        self.ids: dict[str, int] = {}  # an image's label by its id
        self.answers: dict[str, int] = {}
        folder.mkdir()
        self.labels = TsvFile(folder / LABELS[0], stack)
        self.qa: TsvFile | None = None
        self._next()

    def _next(self) -> None:
        self.chunk += 1
        self.place = self.folder / str(self.chunk) if self.chunked else self.folder
        self.place.mkdir(exist_ok=True)
        self.features, self.predictions = (TsvFile(self.place / name, self.stack) for name in (FEATURES, LABELS[1]))
        self._of_chunk: dict[str, int] = {}

    def add(self, id: str, features: tuple[bytes, bytes], label: bytes) -> None:
        if self.chunked and self.features.rows >= CHUNK:
            self._close_chunk()
            self._next()
        self.ids[id] = self.labels.write(id.encode(), label)
        self.predictions.write(id.encode(), label)
        self._of_chunk[id] = self.features.write(id.encode(), *features)

    def answer(self, id: str, text: str) -> None:
        self.qa = self.qa or TsvFile(self.folder / QA, self.stack)
        self.answers[id] = self.qa.write(id.encode(), _json({"labels": [text]}))

    def _close_chunk(self) -> None:
        self.features.close()
        self.predictions.close()
        (self.place / IDS).write_bytes(_json(self._of_chunk))

    def close(self) -> None:
        self._close_chunk()
        self.labels.close()
        (self.folder / IDS).write_bytes(_json(self.ids))
        if self.qa:
            self.qa.close()
            (self.folder / ANSWER_IDS).write_bytes(_json(self.answers))


class OscarWriter:
    """Writes samples into a folder as Oscar's TSV files, and last the YAML by which they are read.

    `stack` closes the files if that fails.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._datasets: dict[str, _Dataset] = {}
        self._corpus = TsvFile(folder / CORPUS, stack)
        self._put: Counter[str] = Counter()  # images by source of another name
        self._refused: Counter[str] = Counter()
        self._without = 0  # images without regions

    def add(self, sample: Sample) -> tuple[str, str]:
        """Write a sample and return the file and id that it has there.

        Raises:
            OperationError: the size of the image is unknown.
        """
        image, regions = sample.image, sample.regions
        self._without += not len(regions.boxes)
        if min(image.width, image.height) < 1:
            raise OperationError(f"{sample.key}: its width or height is missing, which this format cannot be without")

        name = {"cc": "googlecc"}.get(image.source, image.source)
        if name not in KNOWN:
            self._put[image.source] += 1
            name = OTHERS

        if name not in self._datasets:
            self._datasets[name] = _Dataset(self._folder / name, name in CHUNKED, self._stack)

        dataset = self._datasets[name]
        id = free_id(dataset.ids, plain(image.id), plain(f"{image.source}/{image.id}"), plain(sample.key))
        z = positions(regions.boxes, image.width, image.height)
        numbers = np.concatenate([regions.features.astype(np.float32, copy=False), z], 1)
        dataset.add(id, (b"%d" % len(numbers), encode(numbers, "<f4")), _json(_label(sample)))
        shown = f"{'cc' if name == 'googlecc' else name}" + f"_{dataset.chunk}" * dataset.chunked

        for text in sample.texts:
            self._add_text(dataset, shown, id, text, " ".join(regions.tags))

        return str((dataset.place / FEATURES).relative_to(self._folder)), id

    def _add_text(self, dataset: _Dataset, name: str, image: str, text: Text, tags: str) -> None:
        """Write a row of the corpus, unless the reader would fail on it."""
        is_qa = text.kind == "qa"
        first = re.sub(r"[\t\r\n]", " ", (text.question if is_qa else text.text) or "").strip()
        second = text.answer if is_qa else tags
        if not first or not second:
            self._refused["an empty text" if not first else "an empty answer" if is_qa else "no tags"] += 1
            return

        row = f"{name}_{image}"
        label = row
        if is_qa:
            text_id = f"{image}-{plain(text.id)}"
            id = free_id(dataset.answers, plain(text.id), text_id, f"{text_id}-{len(dataset.answers)}")
            dataset.answer(id, second)
            label = f"{name}_qa_{image}_{id}"

        self._corpus.write(row.encode(), label.encode(), first.encode("utf-8", "replace"))

    def close(self) -> list[str]:
        """Write what comes last and return what people should know, a line each."""
        for dataset in self._datasets.values():
            dataset.close()

        self._corpus.close()
        names = list(self._datasets)
        content = {
            "corpus": "_".join(names),
            "corpus_file": CORPUS,
            "image_label_path": {name: name for name in names},
            "image_feature_path": {name: name for name in names},
        }
        (self._folder / YAML).write_text(yaml.safe_dump(content, sort_keys=False))
        notes = [
            f"{n:,} images of {source!r} are under {OTHERS!r}: that is no name that microsoft/Oscar knows"
            for source, n in self._put.items()
        ]
        if self._without:
            notes.append(f"{self._without:,} images have no regions: run_retrieval.py fails if it is given them")

        if self._refused:
            why = ", ".join(f"{reason}: {n:,}" for reason, n in self._refused.most_common())
            notes.append(
                f"{self._refused.total():,} texts are not in {CORPUS}, as microsoft/Oscar fails on them ({why})"
            )

        return notes


def _label(sample: Sample) -> dict[str, Any]:
    regions = sample.regions
    k = len(regions.boxes)
    objects: list[dict[str, Any]] = [
        {"class": tag, "conf": score, "rect": rect}
        for tag, score, rect in zip(
            regions.tags or [""] * k, regions.scores or [0.0] * k, regions.boxes.tolist(), strict=True
        )
    ]

    for one, some in zip(objects, regions.attributes, strict=False):
        one |= {"attributes": [a.name for a in some], "attr_scores": [a.score for a in some]}

    truth = {"gt_objects": [{"class": tag} for tag in sample.gt_tags]} if sample.gt_tags else {}
    return {"image_h": sample.image.height, "image_w": sample.image.width, "objects": objects, **truth}


def _json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()  # in ASCII: the reader opens it in whatever encoding
