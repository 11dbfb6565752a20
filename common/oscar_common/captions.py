"""Files of captions and questions in several forms: tables of texts, and which image each one's name means."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oscar_common.errors import UsageError
from oscar_common.tables import TEXTS, Ints, find, in_line, last, numbers, once, reading, table

IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename", "filepath", "path", "image_id", "id", "key")
TEXT_COLUMNS = ("caption", "captions", "text", "texts", "sentence", "sentences")
FLAG = "--captions"


def read_texts(path: Path, source: str) -> pa.Table:
    """Read a file of texts of one dataset: a table of the schema TEXTS, `image` being whatever name the file uses.

    Raises:
        UsageError: it cannot be read, or its form or its columns are not known.
    """
    named = _read(path)
    with reading(path, FLAG):
        return table(TEXTS, ((name, kind, source, *text) for name, kind, *text in named))


def read_beside(folder: Path, paths: pa.Array, source: str) -> pa.Table:
    """Read the .txt files that are named like images, given the images' paths: a text a line."""
    with reading(folder, FLAG):
        return table(TEXTS, ((name, kind, source, *text) for name, kind, *text in _beside(folder, paths)))


def match(wanted: pa.Array, exact: Sequence[pa.Array], paths: pa.Array, ids: pa.Array) -> Ints:
    """Return the image that each name means, or -1.

    A name may be one of the `exact` names of images (columns of equal length, the most exact first), the last part of
    its path or its id, or COCO's number (139 for 000000000139.jpg). The more exact wins; one of the latter that several
    images share names none of them.
    """
    rows = np.full(len(wanted), -1, np.int64)
    means = (*exact, once(last(paths)), once(last(ids)), once(numbers(last(ids))))
    for names in (wanted, last(wanted)):
        for mean in means:
            unknown = np.flatnonzero(rows < 0)
            rows[unknown] = find(names.take(pa.array(unknown)), mean)
    return rows


Named = tuple[str, str, str, str | None, str | None, str | None]  # image, kind, the text's id, text, question, answer


def _caption(image: str, text: str, number: str) -> Named:
    return os.path.normpath(image), "caption", number, text, None, None


def _beside(folder: Path, paths: pa.Array) -> Iterator[Named]:
    for image in paths.to_pylist():
        path = folder / (os.path.splitext(image)[0] + ".txt")
        if os.path.isfile(path):  # unlike the method, for names that are too long as well
            for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").split("\n")):
                if line.strip():
                    yield _caption(image, line, str(number))


def _read(path: Path) -> Iterator[Named]:
    forms = {".json": _json, ".jsonl": _jsonl, ".parquet": _parquet, ".tsv": _table, ".csv": _table}
    if path.suffix.lower() not in forms:
        raise UsageError(f"{FLAG} {path}: unknown form {path.suffix!r}; allowed: {' '.join(sorted(forms))}, or txt")
    return forms[path.suffix.lower()](path)


def _json(path: Path) -> Iterator[Named]:
    """COCO's captions_*.json, or a list of objects like the lines of a .jsonl file."""
    content = json.loads(path.read_bytes())
    if isinstance(content, list):
        yield from _records(content, path)
        return
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise UsageError(f"{FLAG} {path}: not COCO captions: no `images` and `annotations` lists in it")
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for annotation in content["annotations"]:
        if "caption" not in annotation:
            raise UsageError(f"{FLAG} {path}: its annotations have no `caption`; give captions_*.json, not instances")
        number = annotation["image_id"]
        yield _caption(str(names.get(number, number)), str(annotation["caption"] or ""), str(annotation.get("id", "")))


def _jsonl(path: Path) -> Iterator[Named]:
    with path.open(encoding="utf-8-sig") as file:
        yield from _records((json.loads(line) for line in file if line.strip()), path)


def _parquet(path: Path) -> Iterator[Named]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from _records(batch.to_pylist(), path)


def _table(path: Path) -> Iterator[Named]:
    """A .tsv or .csv file; without a header its two columns are image and caption."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = tsv_rows(file) if path.suffix.lower() == ".tsv" else csv.reader(file)
        first = next(rows, [])
        header = [column.strip().lower() for column in first]
        if set(header) & set(IMAGE_COLUMNS) and set(header) & set(TEXT_COLUMNS):
            yield from _records((dict(zip(header, row, strict=False)) for row in rows if row), path)
        elif len(header) == 2:  # no header
            for number, row in enumerate([first, *rows]):
                yield _caption(row[0], row[1] if len(row) > 1 else "", str(number))
        elif header:
            next(_records([dict.fromkeys(header, "")], path))  # says which columns are needed


def tsv_rows(lines: Iterable[str]) -> Iterator[list[str]]:
    """Split line by line, so that a caption with a lone quotation mark cannot swallow the lines after it."""
    for line in lines:
        yield next(csv.reader([line.rstrip("\r\n")], delimiter="\t"), [])


def _records(records: Iterable[dict[str, Any]], path: Path) -> Iterator[Named]:
    for number, record in enumerate(records):
        image, text = _first(record, IMAGE_COLUMNS), _first(record, TEXT_COLUMNS)
        if image is not None and record.get("question") is not None and record.get("answer") is not None:
            asked = str(record["question"]), str(record["answer"])
            yield os.path.normpath(str(image)), "qa", str(record.get("question_id", number)), None, *asked
            continue
        if image is None or text is None:
            raise UsageError(
                f"{FLAG} {path}: row {number} has the columns {in_line(', '.join(map(str, record)))}; needed are an "
                f"image ({', '.join(IMAGE_COLUMNS)}) and a text ({', '.join(TEXT_COLUMNS)}), or question and answer"
            )
        for several, one in enumerate(text if isinstance(text, list) else [text]):
            id = str(record.get("caption_id", number if several == 0 else f"{number}-{several}"))
            yield _caption(str(image), "" if one is None else str(one), id)


def _first(record: dict[str, Any], names: Sequence[str]) -> Any:
    """Return what the first of these columns says that is not empty; "" if all are, None if there is none."""
    said = [record[name] for name in names if name in record]
    return next((value for value in said if value is not None), "" if said else None)
