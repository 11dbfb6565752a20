"""The fields of other people's rows: numbers, names and attributes, checked."""

import binascii
import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from oscar_common.sample import Attribute, Regions

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Refused(ValueError):
    """A row cannot become a sample; `reason` is one word to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Vocabulary:
    """The names that numbers stand for. Both are empty where the format has names, or tags are not asked for."""

    classes: list[str]
    attributes: list[str]


def decode(field: bytes, dtype: str, count: int, name: str) -> npt.NDArray[Any]:
    """Return the numbers of a base64 field, [count]; nothing is allocated before the field is seen to be as long.

    Raises:
        Refused: it has another length, or is no base64.
    """
    size = count * np.dtype(dtype).itemsize
    if len(field) != -(-size // 3) * 4:
        raise Refused(
            "size", f"{name}: {len(field):,} characters of base64; {count:,} of {dtype} have {-(-size // 3) * 4:,}"
        )

    raw = _base64(field, name)
    if len(raw) != size:  # characters that are none of base64's are passed over, so that fewer bytes come out
        raise Refused("base64", f"{name}: not base64 throughout")

    return np.frombuffer(raw, dtype)


def _base64(field: bytes, name: str) -> bytes:
    try:
        return binascii.a2b_base64(field)
    except binascii.Error as error:
        raise Refused("base64", f"{name}: {error}") from None


def encode(array: npt.NDArray[Any], dtype: str) -> bytes:
    """Return an array as a base64 field of another dtype."""
    return binascii.b2a_base64(np.ascontiguousarray(array, dtype).data, newline=False)


def whole(field: bytes, name: str) -> int:
    """Read a whole number of a TSV.

    Raises:
        Refused: it is none.
    """
    if not (field.isdigit() and len(field) < 12):
        raise Refused("number", f"{name}: {field[:40]!r} is no whole number")
    return int(field)


def names_of(numbers: Ints, vocabulary: list[str], what: str) -> list[str]:
    """Return the names of class numbers [K]; none if all are -1, which stands for: not known.

    Raises:
        Refused: there is no such class.
    """
    if not vocabulary or not len(numbers) or (numbers == -1).all():
        return []
    if numbers.min() < 0 or numbers.max() >= len(vocabulary):
        wrong = numbers[(numbers < 0) | (numbers >= len(vocabulary))][0]
        raise Refused("class", f"{what} {wrong}; there are {len(vocabulary):,} names for them, from 0 on")
    return [vocabulary[n] for n in numbers.tolist()]


def attributes_of(numbers: Ints, scores: Floats, vocabulary: list[str]) -> list[list[Attribute]]:
    """Return the attribute of each region, given numbers and scores [K]; -1 stands for none.

    Raises:
        Refused: there is no such attribute.
    """
    if not vocabulary or (numbers == -1).all():
        return []

    names = names_of(np.maximum(numbers, 0), vocabulary, "attribute")
    return [
        [Attribute(id=number, name=name, score=score)] if number >= 0 else []
        for number, name, score in zip(numbers.tolist(), names, scores.tolist(), strict=True)
    ]


def numbers_of(regions: Regions, vocabulary: Vocabulary) -> dict[str, npt.NDArray[Any]]:
    """Return tags, scores and the likeliest attributes of K regions as LXMERT's four arrays [K]; -1 where unknown."""
    k = len(regions.boxes)
    position = {name: number for number, name in reversed(list(enumerate(vocabulary.classes)))}
    first = [attributes[0] if attributes else None for attributes in regions.attributes] or [None] * k
    return {
        "objects_id": np.array([position.get(tag, -1) for tag in regions.tags] or [-1] * k, "<i8"),
        "objects_conf": np.array(regions.scores or [0] * k, "<f4"),
        "attrs_id": np.array([-1 if a is None else a.id for a in first], "<i8"),
        "attrs_conf": np.array([0 if a is None else a.score for a in first], "<f4"),
    }


def plain(id: str, allowed: str = "A-Za-z0-9.-") -> str:
    """Return an id in which only these characters are left; each byte of others becomes `%XX`, one-to-one."""
    escaped = re.sub(rb"[^%b]" % allowed.encode(), lambda m: b"%%%02X" % m[0][0], id.encode("utf-8", "surrogateescape"))
    return "%71a" if escaped == b"qa" else escaped.decode() or "%"  # microsoft/Oscar takes an id "qa" for a mark


def free_id(taken: Container[str], *candidates: str) -> str:
    """Return the first candidate that is not taken, or else the last one with a number."""
    for candidate in candidates:
        if candidate not in taken:
            return candidate

    number = 2
    while (numbered := f"{candidates[-1]}%{number}") in taken:
        number += 1

    return numbered
