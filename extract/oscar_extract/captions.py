"""The texts of a job: caption files of several forms, joined to the images that they name."""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from oscar_common.errors import UsageError
from oscar_common.sample import Text
from oscar_extract.sources import Source

IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename", "filepath", "path", "image_id", "id", "key")
TEXT_COLUMNS = ("caption", "captions", "text", "texts", "sentence", "sentences")
NUMBER = re.compile(r"^(?:COCO_\w+_)?0*(\d+)$")
BESIDE = ("txt", ".txt", "*.txt")


@dataclass(frozen=True, kw_only=True)
class Texts:
    """`by_id`: image id to its texts. `unmatched`: how many texts name no image of the folder."""

    by_id: dict[str, list[Text]]
    unmatched: int = 0


def read_texts(captions: str, folder: Path, images: list[Source]) -> Texts:
    """Read `--captions` and join it to the images.

    Raises:
        UsageError: no such file, a form that is not known, or no text that names any image.
    """
    path = Path(captions)
    if captions in BESIDE or path.is_dir():
        named = _beside(folder if captions in BESIDE else path, images)
    elif path.is_file():
        named = _read(path)
    else:
        raise UsageError(f"--captions {captions}: no such file (or say txt for .txt files beside the images)")
    try:
        texts = _join(named, images, "txt" if captions in BESIDE else path.stem)
    except (ValueError, KeyError, TypeError, AttributeError, pa.ArrowException, csv.Error) as error:
        raise UsageError(f"--captions {captions}: cannot be read as {path.suffix or 'captions'}: {error!r}") from None
    if not texts.by_id:
        raise UsageError(
            f"--captions {captions}: none of its {texts.unmatched} texts names an image under {folder} "
            f"(images there are like {images[0].path!r}); give the captions of these images, or another --images"
        )
    return texts


Named = tuple[str, str, str]  # what the file says of the image, the text, the text's id


def _join(named: Iterable[Named], images: list[Source], source: str) -> Texts:
    lookup = _lookup(images)
    by_id: dict[str, list[Text]] = {}
    unmatched = 0
    for name, text, number in named:
        image = lookup.get(os.path.normpath(name)) or lookup.get(os.path.basename(name))
        if image is None or not text.strip():
            unmatched += 1
        else:
            by_id.setdefault(image, []).append(Text(kind="caption", source=source, id=number, text=text.strip()))
    return Texts(by_id=by_id, unmatched=unmatched)


def _lookup(images: list[Source]) -> dict[str, str | None]:
    """Map everything that a caption file may call an image to the image's id.

    That is its path, its id, the last part of each, and COCO's number (139 for 000000000139.jpg). The more exact name
    wins; one that several images share names none of them.
    """
    last = [os.path.basename(i.id) for i in images]
    lookup: dict[str, str | None] = {}
    for names in ([NUMBER.sub(r"\1", n) for n in last], last, [os.path.basename(i.path) for i in images]):
        count = Counter(names)
        lookup |= {name: i.id if count[name] == 1 else None for name, i in zip(names, images, strict=True)}
    return lookup | {i.id: i.id for i in images} | {i.path: i.id for i in images}


def _beside(folder: Path, images: list[Source]) -> Iterator[Named]:
    for image in images:
        path = folder / (os.path.splitext(image.path)[0] + ".txt")
        if path.is_file():
            for number, line in enumerate(path.read_text(errors="replace").splitlines()):
                if line.strip():
                    yield image.path, line, str(number)


def _read(path: Path) -> Iterator[Named]:
    forms = {".json": _json, ".jsonl": _jsonl, ".parquet": _parquet, ".tsv": _table, ".csv": _table}
    if path.suffix.lower() not in forms:
        raise UsageError(f"--captions {path}: unknown form {path.suffix!r}; allowed: {' '.join(sorted(forms))}, or txt")
    return forms[path.suffix.lower()](path)


def _json(path: Path) -> Iterator[Named]:
    """COCO's captions_*.json, or a list of objects like the lines of a .jsonl file."""
    content = json.loads(path.read_bytes())
    if isinstance(content, list):
        yield from _records(content, path)
        return
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise UsageError(f"--captions {path}: not COCO captions: no `images` and `annotations` lists in it")
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for annotation in content["annotations"]:
        if "caption" not in annotation:
            raise UsageError(
                f"--captions {path}: its annotations have no `caption`; give captions_*.json, not instances"
            )
        number = annotation["image_id"]
        yield str(names.get(number, number)), str(annotation["caption"]), str(annotation.get("id", ""))


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
        rows = _tsv_rows(file) if path.suffix.lower() == ".tsv" else csv.reader(file)
        first = next(rows, [])
        header = [column.strip().lower() for column in first]
        if set(header) & set(IMAGE_COLUMNS) and set(header) & set(TEXT_COLUMNS):
            yield from _records((dict(zip(header, row, strict=False)) for row in rows if row), path)
        elif len(header) == 2:  # no header
            for number, row in enumerate([first, *rows]):
                yield row[0], row[1] if len(row) > 1 else "", str(number)
        elif header:
            next(_records([dict.fromkeys(header, "")], path))  # says which columns are needed


def _tsv_rows(lines: Iterable[str]) -> Iterator[list[str]]:
    """Split line by line, so that a caption with a lone quotation mark cannot swallow the lines after it."""
    for line in lines:
        yield next(csv.reader([line.rstrip("\r\n")], delimiter="\t"), [])


def _records(records: Iterable[dict[str, Any]], path: Path) -> Iterator[Named]:
    for number, record in enumerate(records):
        image = next((record[c] for c in IMAGE_COLUMNS if c in record), None)
        text = next((record[c] for c in TEXT_COLUMNS if c in record), None)
        if image is None or text is None:
            raise UsageError(
                f"--captions {path}: row {number} has the columns {', '.join(map(str, record))}; needed are an image "
                f"({', '.join(IMAGE_COLUMNS)}) and a text ({', '.join(TEXT_COLUMNS)})"
            )
        for several, one in enumerate(text if isinstance(text, list) else [text]):
            yield str(image), str(one), str(record.get("caption_id", number if several == 0 else f"{number}-{several}"))
