"""The JSON of samples as typed columns: many at once, by Arrow's own parser."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.json as pj

TEXT = pa.struct([(name, pa.string()) for name in ("kind", "source", "id", "text", "question", "answer")])
ATTRIBUTE = pa.struct([("id", pa.int32()), ("name", pa.string()), ("score", pa.float32())])
IMAGE = pa.struct(
    [
        ("source", pa.string()),
        ("id", pa.string()),
        ("path", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
    ]
)
LISTS = {
    "tags": pa.list_(pa.string()),
    "scores": pa.list_(pa.float32()),
    "attributes": pa.list_(pa.list_(ATTRIBUTE)),  # a list for every region
    "gt_tags": pa.list_(pa.string()),  # of the image
    "texts": pa.list_(TEXT),
}
CONTENT = pa.schema([*IMAGE, *LISTS.items()])
_FORM = pa.struct([("image", IMAGE), *LISTS.items()])


def read_content(contents: list[bytes]) -> tuple[pa.RecordBatch, dict[int, str]]:
    """Parse the JSON of some samples into columns of `CONTENT`; what is missing is null, or an empty list.

    Return the rows that could be parsed, and for the others their number and what is wrong.
    """
    parsed = _parse(contents)
    if parsed is not None:
        return _columns(parsed), {}

    wrong: dict[int, str] = {}
    rows = []
    for number, content in enumerate(contents):
        try:
            document = _parse([content])
            rows.append(_parse_slowly(content) if document is None else document)
        except (ValueError, TypeError, OverflowError, RecursionError, LookupError, pa.ArrowException) as error:
            wrong[number] = f"json: {' '.join(str(error).split())[:200]}"

    whole: pa.StructArray = pa.concat_arrays(rows) if rows else pa.array([], _FORM)
    return _columns(whole), wrong


def _parse(contents: list[bytes]) -> pa.StructArray | None:
    """Parse all of them in one go; None if that does not work, for whatever reason.

    Each stands in an object of its own with its number, so that none can pass for two, or for a part of its neighbour.
    """
    if not contents:
        return pa.array([], _FORM)

    try:
        block = b"\n".join(b'{"number":%d,"content":%b}' % (n, c) for n, c in enumerate(contents))
        str(block, "utf-8")  # what Arrow does not check
        table = pj.read_json(
            pa.BufferReader(block),
            read_options=pj.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=pj.ParseOptions(
                explicit_schema=pa.schema([("number", pa.int64()), ("content", _FORM)]),
                newlines_in_values=True,
                unexpected_field_behavior="ignore",
            ),
        )
    except (ValueError, pa.ArrowException):
        return None

    if not table["number"].equals(pa.chunked_array([range(len(contents))], pa.int64())) or table["content"].null_count:
        return None

    return table["content"].combine_chunks()


def _parse_slowly(content: bytes) -> pa.StructArray:
    """Parse one with Python's json, and let numbers pass for the ids that they are in many datasets."""
    parsed = json.loads(content)
    if not isinstance(parsed, dict):
        raise ValueError(f"{type(parsed).__name__} instead of an object")

    for name in LISTS:
        if not isinstance(parsed.get(name, []), list | None):
            raise ValueError(f"{name} is {type(parsed[name]).__name__} instead of a list")

    image = parsed.get("image")
    if isinstance(image, dict) and isinstance(image.get("id"), int):
        image["id"] = str(image["id"])

    for text in parsed.get("texts") or ():
        if isinstance(text, dict) and isinstance(text.get("id"), int):
            text["id"] = str(text["id"])

    return pa.array([parsed], _FORM)


def _columns(parsed: pa.StructArray) -> pa.RecordBatch:
    image = parsed.field("image")
    fields: list[Any] = list(image.flatten()) if len(parsed) else [pa.array([], f.type) for f in IMAGE]
    lists = [_filled(column, form) for column, form in zip(parsed.flatten()[1:], LISTS.values(), strict=True)]
    return pa.RecordBatch.from_arrays([*fields, *lists], schema=CONTENT)


def _filled(column: pa.ListArray, form: pa.DataType) -> pa.ListArray:
    """Return a column of lists with an empty list where there is none."""
    if not column.null_count:
        return column
    return pa.array([[] if row is None else row for row in column.to_pylist()], form)
