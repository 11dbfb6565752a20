"""Manifest files, .jsonl, .csv, .tsv or .parquet: a row for each image and text, with columns path, text, source."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oscar_common.captions import ID_COLUMNS, PATH_COLUMNS, TEXT_COLUMNS
from oscar_common.errors import UsageError
from oscar_common.tables import CHUNK, TEXTS, Ints, array, columns, find, in_line, reading, text_array
from oscar_common.text_files import json_lines, table_rows
from oscar_extract.sources.folder import make_ids
from oscar_extract.sources.tables import FILES, IMAGES, LEFT_OUT, Annotations

FLAG = "--images"
NAMES = {
    "path": PATH_COLUMNS,
    "text": TEXT_COLUMNS,
    "question": ("question",),
    "answer": ("answer",),
    "source": ("source", "dataset"),
    "id": ID_COLUMNS,
}
ROWS = pa.schema([(name, pa.string()) for name in (*NAMES, "number")])


def is_listing(path: Path) -> bool:
    """Whether `--images` names a manifest file."""
    return path.suffix.lower() in _FORMS and path.is_file()


def read_listing(path: Path, name: str) -> tuple[pa.Table, Annotations]:
    """Return the images that a manifest names, as a table of the schema FILES, and what it says of them.

    Paths are relative to the manifest's folder. Rows with the same path are one image with all their texts; `source` is
    `name` where a row has none, and an image's id is its path without the extension unless there is a column `id`.

    Raises:
        UsageError: it cannot be read, has no column of paths, or gives two files one id.
    """
    with reading(path, FLAG):
        rows = pa.concat_tables([ROWS.empty_table(), *_FORMS[path.suffix.lower()](path)])

    rows = rows.set_column(4, "source", pc.coalesce(array(rows["source"]), name))
    nameless = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(array(rows["path"])), ""), True)
    strays, rows = rows.filter(nameless), rows.filter(pc.invert(nameless))
    if not len(rows):
        raise UsageError(f"{FLAG} {path}: no row of it names an image; needed is a column {' or '.join(PATH_COLUMNS)}")

    paths = pc.replace_substring_regex(array(rows["path"]), r"(^|/)(\./+)+", r"\1")
    paths = pc.replace_substring_regex(paths, "//+", "/")
    unique = pc.unique(paths)
    of_row = find(paths, unique)
    first = np.unique(of_row, return_index=True)[1]  # the row that names each image first
    ids = _ids(path, unique, array(rows["id"]).take(pa.array(first)), array(rows["source"]).take(pa.array(first)))
    files = columns(FILES, len(unique), root=0, path=unique)
    images = columns(IMAGES, len(unique), image=ids, name=unique, file=np.arange(len(unique)), split="train")
    images = images.set_column(0, "dataset", array(rows["source"]).take(pa.array(first)))
    is_qa = pc.and_(array(rows["question"]).is_valid(), array(rows["answer"]).is_valid())
    texts = columns(
        TEXTS,
        len(rows),
        image=ids.take(pa.array(of_row)),
        kind=pc.if_else(is_qa, "qa", "caption"),
        source=rows["source"],
        id=rows["number"],
        text=pc.if_else(is_qa, None, array(rows["text"])),
        question=pc.if_else(is_qa, array(rows["question"]), None),
        answer=pc.if_else(is_qa, array(rows["answer"]), None),
    )
    texts = texts.filter(pc.or_(array(texts["text"]).is_valid(), is_qa))
    left_out = columns(
        LEFT_OUT,
        len(strays),
        dataset=strays["source"],
        image=path.name,
        reason="text-without-image",
        message=strays["text"],
    )

    return files, Annotations(images=images, texts=texts, left_out=left_out)


def _ids(path: Path, paths: pa.Array, given: pa.Array, source: pa.Array) -> pa.Array:
    """Return "source/id" for each image."""
    source = pc.replace_substring(source, "/", "_")  # what comes before the first slash is the source
    ids = pc.binary_join_element_wise(source, pc.coalesce(given, make_ids(paths)), "/")
    if len(pc.unique(ids)) < len(ids):
        at = np.flatnonzero(find(ids, ids) != np.arange(len(ids)))[0]
        shared = f"{paths[int(find(ids, ids)[at])]} and {paths[int(at)]} share the id {ids[int(at)]}"
        raise UsageError(f"{FLAG} {path}: {in_line(shared)}; give each its own")

    return ids


def _renamed(path: Path, table: pa.Table, start: int) -> pa.Table:
    """Return a table of the schema ROWS from one whose columns have any of the known names."""
    lower = {str(n).strip().lower(): n for n in reversed(table.column_names)}
    chosen = {to: [array(table[lower[n]]) for n in names if n in lower] for to, names in NAMES.items()}
    if not chosen["path"]:
        raise UsageError(
            f"{FLAG} {path}: it has the columns {in_line(', '.join(table.column_names))}; needed is "
            f"{' or '.join(PATH_COLUMNS)}"
        )

    number = pa.array(np.arange(start, start + len(table))).cast(pa.string())
    values: dict[str, Any] = {to: _coalesced(several) for to, several in chosen.items() if several}
    if "text" in values and _is_list(values["text"].type):
        lists = values["text"].to_pylist()
        values["text"] = text_array([items or [None] for items in lists], pa.list_(pa.string()))  # no image is lost
        rows = pc.list_parent_indices(values["text"])
        values = {to: pc.list_flatten(v) if to == "text" else v.take(rows) for to, v in values.items()}
        number = _numbered(number.take(rows), rows.to_numpy())

    if "text" in values:
        values["text"] = values["text"].cast(pa.string())

    return columns(ROWS, len(number), **values, number=number)


def _coalesced(several: list[pa.Array]) -> pa.Array:
    """Return of columns that mean the same what the first of them says, row by row."""
    return pc.coalesce(*(column for column in several if column.type == several[0].type))


def _is_list(form: pa.DataType) -> bool:
    return bool(pa.types.is_list(form)) or pa.types.is_large_list(form) or pa.types.is_fixed_size_list(form)


def _numbered(number: pa.Array, rows: Ints) -> pa.Array:
    """Return ids of texts given each one's row: 7, 7-1, 7-2 for the texts of row 7."""
    several = np.arange(len(rows)) - np.searchsorted(rows, rows)
    further = pc.binary_join_element_wise(number, pa.array(several).cast(pa.string()), "-")
    return pc.if_else(pa.array(several == 0), number, further)


def _parquet(path: Path) -> Iterator[pa.Table]:
    known = {n for names in NAMES.values() for n in names}
    with pq.ParquetFile(path) as file:
        known_columns = [n for n in file.schema_arrow.names if n.strip().lower() in known]
        start = 0
        for batch in file.iter_batches(CHUNK, columns=known_columns):
            yield _renamed(path, pa.Table.from_batches([batch]), start)
            start += len(batch)


def _jsonl(path: Path) -> Iterator[pa.Table]:
    yield from _tables(path, json_lines(path, FLAG))


def _table(path: Path) -> Iterator[pa.Table]:
    rows = table_rows(path, FLAG)
    header = next(rows, [])
    yield from _tables(path, (dict(zip(header, row, strict=False)) for row in rows))


def _tables(path: Path, records: Iterator[dict[str, Any]]) -> Iterator[pa.Table]:
    """Cut records into tables, everything in them as text; an empty cell says nothing."""
    start, chunk = 0, []
    known = {n for names in NAMES.values() for n in names}
    for record in records:
        fields = {k.strip().lower(): v for k, v in record.items() if isinstance(k, str) and v not in (None, "")}
        chunk.append({k: fields.get(k) for k in sorted(known & fields.keys())})
        if not (known & {str(k).strip().lower() for k in record}) & set(PATH_COLUMNS):
            raise UsageError(
                f"{FLAG} {path}: row {start + len(chunk) - 1} has the columns {in_line(', '.join(map(str, record)))}; "
                f"needed is {' or '.join(PATH_COLUMNS)}"
            )

        if len(chunk) == CHUNK:
            yield _from_records(path, chunk, start)
            start, chunk = start + len(chunk), []

    if chunk:
        yield _from_records(path, chunk, start)


def _from_records(path: Path, chunk: list[dict[str, Any]], start: int) -> pa.Table:
    names = sorted({k for record in chunk for k in record} | {"path"})
    lists = any(isinstance(record.get(n), list) for record in chunk for n in TEXT_COLUMNS)
    by_name = {}

    for name in names:
        values = [record.get(name) for record in chunk]
        if lists and name in TEXT_COLUMNS:
            several = [v if isinstance(v, list) else [v] for v in values]
            by_name[name] = text_array(
                [[t if t is None else str(t) for t in v] for v in several], pa.list_(pa.string())
            )
        else:
            by_name[name] = text_array([None if v is None else str(v) for v in values], pa.string())

    return _renamed(path, pa.table(by_name), start)


_FORMS: dict[str, Callable[[Path], Iterator[pa.Table]]] = {
    ".parquet": _parquet,
    ".jsonl": _jsonl,
    ".csv": _table,
    ".tsv": _table,
}
