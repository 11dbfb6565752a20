"""Files of captions and questions in several forms: tables of texts, and which image each one's name means."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oscar_common.errors import UsageError
from oscar_common.tables import (
    CHUNK,
    TEXTS,
    Ints,
    columns,
    find,
    in_line,
    last,
    numbers,
    once,
    reading,
    table,
    text_array,
)
from oscar_common.text_files import json_lines, read_json, read_text, split_lines, table_rows

# Names of columns, of captions and of lists of images alike; of several that a file has, the first counts
PATH_COLUMNS = ("path", "image_path", "image", "file_name", "filename", "filepath", "file_path", "file", "image_name")
ID_COLUMNS = ("image_id", "id", "key")
IMAGE_COLUMNS = (*PATH_COLUMNS, *ID_COLUMNS)
TEXT_COLUMNS = ("caption", "captions", "text", "texts", "sentence", "sentences")
FLAG = "--captions"


def read_texts(path: Path, source: str) -> pa.Table:
    """Read a file of texts of one dataset: a table of the schema TEXTS, `image` being whatever name the file uses.

    Raises:
        UsageError: it cannot be read, or its form or its columns are not known.
    """
    form = path.suffix.lower()
    if form not in _FORMS:
        raise UsageError(f"{FLAG} {path}: unknown form {path.suffix!r}; allowed: {' '.join(sorted(_FORMS))}, or txt")
    with reading(path, FLAG):
        return pa.concat_tables([TEXTS.empty_table(), *_FORMS[form](path, source)])


def read_beside(folder: Path, paths: pa.Array, source: str) -> pa.Table:
    """Read the .txt files that are named like images, given the images' paths: a text a line."""
    with reading(folder, FLAG):
        return _filled(_beside(folder, paths), source)


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


def _filled(rows: Iterable[Named], source: str) -> pa.Table:
    return table(TEXTS, ((image, kind, source, *text) for image, kind, *text in rows))


def _caption(image: str, text: str, number: str) -> Named:
    return os.path.normpath(image), "caption", number, text, None, None


def _beside(folder: Path, paths: pa.Array) -> Iterator[Named]:
    for image in paths.to_pylist():
        path = folder / (os.path.splitext(image)[0] + ".txt")
        if os.path.isfile(path):  # unlike the method, for names that are too long as well
            for number, line in enumerate(split_lines(read_text(path, FLAG))):
                if line.strip():
                    yield _caption(image, line, str(number))


def _json(path: Path, source: str) -> Iterator[pa.Table]:
    """Read COCO's captions_*.json, VQA's *_questions.json, or a list of objects like the lines of a .jsonl file."""
    content = read_json(path, FLAG)
    if isinstance(content, list):
        yield _filled(_records(_told(content, path), path), source)
    elif isinstance(content, dict) and isinstance(content.get("questions"), list):
        yield from _chunks(
            _vqa(content["questions"], path), ["image", "question_id", "question", "answer"], path, source
        )
    elif isinstance(content, dict) and all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        yield from _chunks(_coco(content, path), ["image", "caption_id", "caption"], path, source)
    else:
        raise UsageError(f"{FLAG} {path}: not COCO captions: no `images` and `annotations` lists in it")


def _coco(content: dict[str, Any], path: Path) -> Iterator[list[str]]:
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for annotation in content["annotations"]:
        if "caption" not in annotation:
            raise UsageError(f"{FLAG} {path}: its annotations have no `caption`; give captions_*.json, not instances")
        number = annotation["image_id"]
        yield [str(names.get(number, number)), str(annotation.get("id", "")), str(annotation["caption"] or "")]


def _vqa(questions: list[Any], path: Path) -> Iterator[list[str]]:
    """Yield VQA's questions with the commonest answer of each, which stands in another file; none without one."""
    beside = path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    if beside == path or not beside.is_file():
        raise UsageError(f"{FLAG} {path}: questions without answers: no *_annotations.json of the same name beside it")

    annotations = read_json(beside, FLAG, lambda o: {k: o[k] for k in _VQA & o.keys()})["annotations"]
    answers = {one["question_id"]: str(one["multiple_choice_answer"]) for one in annotations}
    for question in questions:
        if (number := question["question_id"]) in answers:
            yield [str(question["image_id"]), str(number), str(question["question"]), answers[number]]


_VQA = {"annotations", "question_id", "multiple_choice_answer"}


def _jsonl(path: Path, source: str) -> Iterator[pa.Table]:
    yield _filled(_records(_told(json_lines(path, FLAG), path), path), source)


def _parquet(path: Path, source: str) -> Iterator[pa.Table]:
    number = 0
    with pq.ParquetFile(path) as file:
        _tell_ids(file.schema_arrow.names, path)
        for batch in file.iter_batches():
            yield _batch(batch, path, number, source)
            number += len(batch)


def _table(path: Path, source: str) -> Iterator[pa.Table]:
    """Read a .tsv or .csv file; without a header its two columns are image and caption."""
    rows = table_rows(path, FLAG)
    first = next(rows, [])
    header = [column.strip().lower() for column in first]
    asks = {"question", "answer"} <= set(header)
    if set(header) & set(IMAGE_COLUMNS) and (asks or set(header) & set(TEXT_COLUMNS)):
        _tell_ids(header, path)
        yield from _chunks(rows, header, path, source)
    elif len(header) == 2 and not _is_header(header):
        pairs = ([*row, ""][:2] for row in chain([first], rows))
        yield from _chunks(pairs, ["image", "caption"], path, source)
    elif header:
        next(_records([dict.fromkeys(header, "")], path))  # says which columns are needed


def _is_header(cells: list[str]) -> bool:
    """Whether the two cells of a first row are names of columns, though not such as are known, and not a caption."""
    if recognised := {*IMAGE_COLUMNS, *TEXT_COLUMNS}.intersection(cells):
        return all(cell in recognised or re.fullmatch(r"[a-z]+([ _-][a-z]+)?", cell) for cell in cells)
    return all(_HEADER_WORDS.issuperset(re.split(r"[ _-]", cell)) for cell in cells)


_HEADER_WORDS = frozenset(
    [
        *(word for name in (*IMAGE_COLUMNS, *TEXT_COLUMNS) for word in name.split("_")),
        *("images", "img", "photo", "picture", "url", "src", "description", "desc", "comment", "title", "label", "alt"),
    ]
)


def _told(records: Iterable[Any], path: Path) -> Iterator[Any]:
    """Yield the records, and of the first one say what `_tell_ids` has to say."""
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise UsageError(f"{FLAG} {path}: row {number} is no object, {{...}}, but {in_line(repr(record))}")
        if not number:
            _tell_ids(record, path)
        yield record


def _tell_ids(names: Iterable[str], path: Path) -> None:
    """Say that `id` is taken for the image's where it may be the row's: the file has further columns."""
    known = {*TEXT_COLUMNS, "question", "answer", "question_id", "caption_id"}
    if next((name for name in IMAGE_COLUMNS if name in names), None) != "id":
        return

    if other_names := [name for name in names if name != "id" and name not in known]:
        print(
            f"warning: {FLAG} {path}: its column id is taken for the image's; of its other columns "
            f"({in_line(', '.join(other_names))}) none is an image by its name (such as image or file_name)",
            file=sys.stderr,
            flush=True,
        )


def _chunks(rows: Iterator[list[str]], header: list[str], path: Path, source: str) -> Iterator[pa.Table]:
    number = 0
    while chunk := list(islice(rows, CHUNK)):
        if len(set(header)) == len(header) == min(map(len, chunk)) == max(map(len, chunk)):
            arrays = [text_array(column, pa.string()) for column in zip(*chunk, strict=True)]
            yield _batch(pa.RecordBatch.from_arrays(arrays, header), path, number, source)
        else:
            yield _filled(_records((dict(zip(header, row, strict=False)) for row in chunk), path, number), source)
        number += len(chunk)


def _batch(batch: pa.RecordBatch, path: Path, start: int, source: str) -> pa.Table:
    made = _columns(batch, start, source)
    return _filled(_records(batch.to_pylist(), path, start), source) if made is None else made


def _columns(batch: pa.RecordBatch, start: int, source: str) -> pa.Table | None:
    """Return what `_records` makes of the rows of a batch, column by column, which is ten times as fast.

    None: columns are missing, or hold something else than text and whole numbers, which Python's `str` has to see to.
    """
    known = {*IMAGE_COLUMNS, *TEXT_COLUMNS, "question", "answer", "question_id", "caption_id"}
    by_name = {n: _strings(batch.column(n)) for n in batch.schema.names if n in known}
    present = {n: column for n, column in by_name.items() if column is not None}
    ids = [present[n] for n in ("question_id", "caption_id") if n in present]
    if len(present) < len(by_name) or any(column.null_count for column in ids):
        return None

    image, text = ([present[n] for n in names if n in present] for names in (IMAGE_COLUMNS, TEXT_COLUMNS))
    nothing, number = (
        pa.nulls(len(batch), pa.string()),
        pa.array(np.arange(start, start + len(batch))).cast(pa.string()),
    )
    question, answer = (present.get(n, nothing) for n in ("question", "answer"))
    is_qa = pc.and_(question.is_valid(), answer.is_valid())
    if not image or not (text or pc.all(is_qa).as_py()):
        return None

    return columns(
        TEXTS,
        len(batch),
        image=_normal(pc.coalesce(*image, "")),
        kind=pc.if_else(is_qa, "qa", "caption"),
        source=source,
        id=pc.if_else(is_qa, present.get("question_id", number), present.get("caption_id", number)),
        text=pc.if_else(is_qa, None, pc.coalesce(*text, "")),
        question=pc.if_else(is_qa, question, None),
        answer=pc.if_else(is_qa, answer, None),
    )


def _strings(column: pa.Array) -> pa.Array | None:
    """Return a column of text or whole numbers as text; None if it is of anything else."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    form = column.type
    plain = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_null)
    return column.cast(pa.string()) if any(test(form) for test in plain) else None


def _normal(paths: pa.Array) -> pa.Array:
    """Return `os.path.normpath` of each path; few need it."""
    odd = np.flatnonzero(pc.match_substring_regex(paths, r"^$|//|/$|(^|/)\.\.?(/|$)").to_numpy(zero_copy_only=False))
    if not len(odd):
        return paths

    mended = text_array([os.path.normpath(p) for p in paths.take(pa.array(odd)).to_pylist()], pa.string())
    mask = np.zeros(len(paths), bool)
    mask[odd] = True
    return pc.replace_with_mask(paths, pa.array(mask), mended)


def _records(records: Iterable[dict[str, Any]], path: Path, start: int = 0) -> Iterator[Named]:
    for number, record in enumerate(records, start):
        image, text = _first(record, IMAGE_COLUMNS), _first(record, TEXT_COLUMNS)
        if image is not None and record.get("question") is not None and record.get("answer") is not None:
            pair = str(record["question"]), str(record["answer"])
            yield os.path.normpath(str(image)), "qa", str(record.get("question_id", number)), None, *pair
            continue
        if image is None or text is None:
            raise UsageError(
                f"{FLAG} {path}: row {number} has the columns {in_line(', '.join(map(str, record)))}; needed are an "
                f"image ({', '.join(IMAGE_COLUMNS)}) and a text ({', '.join(TEXT_COLUMNS)}), or question and answer"
            )

        for several, item in enumerate(text if isinstance(text, list) else [text]):
            id = str(record.get("caption_id", number if several == 0 else f"{number}-{several}"))
            yield _caption(str(image), "" if item is None else str(item), id)


def _first(record: dict[str, Any], names: Sequence[str]) -> Any:
    """Return what the first of these columns says that is not empty; "" if all are, None if there is none."""
    values = [record[name] for name in names if name in record]
    return next((value for value in values if value is not None), "" if values else None)


_FORMS: dict[str, Callable[[Path, str], Iterator[pa.Table]]] = {
    ".csv": _table,
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".tsv": _table,
}
