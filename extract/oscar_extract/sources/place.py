"""Where a dataset lies, and what its reader needs to find its files there."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from oscar_common import text_files
from oscar_common.errors import UsageError
from oscar_common.tables import TEXTS, Ints, array, reading, table
from oscar_extract.sources.inventory import Bools, Inventory, lie_under
from oscar_extract.sources.tables import IMAGES, Annotations

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Place:
    """One dataset of a job: its name, its folder, the job's files, and the splits whose texts are wanted."""

    name: str
    root: Path
    inventory: Inventory
    splits: frozenset[str] = frozenset({"train"})
    shared: bool = False  # whether other published datasets of the job lie in the same folder
    alone: bool = True  # whether the job has no other dataset
    karpathy: dict[str, dict[str, str]] = field(default_factory=dict)  # split of "coco/139", for coco and flickr30k

    def annotations(self, pattern: str) -> list[Path]:
        """Return this dataset's annotation files whose path under its folder matches, in order."""
        return sorted(
            path
            for path in self.inventory.annotations
            if path.is_relative_to(self.root) and re.search(pattern, str(path.relative_to(self.root)))
        )

    def required(self, pattern: str, what: str) -> list[Path]:
        """Return what `annotations` does.

        Raises:
            UsageError: there is none.
        """
        paths = self.annotations(pattern)
        if not paths:
            raise UsageError(f"--root {self.root}: no {what} in it, which --dataset {self.name} needs")
        return paths

    @cached_property
    def silent(self) -> Bools:
        """Which files may be this dataset's images, as no folder's name speaks of another dataset, bool [F]."""
        inventory = self.inventory
        is_own = inventory.under(self.root) & np.isin(inventory.family, ("", self.name))
        return is_own | np.isin(inventory.outer_family, ("", self.name))

    @cached_property
    def certain(self) -> Bools:
        """Which of those are surely of no other dataset, whatever they are called, bool [F]."""
        inventory = self.inventory
        speaks: Bools = inventory.outer_family == self.name
        if self.alone:
            return self.silent
        return speaks if self.shared else speaks | (inventory.under(self.root) & self.silent)

    @cached_property
    def dead(self) -> pa.Table:
        """The rows of `Inventory.dead` that come from this dataset's folder."""
        dead = self.inventory.dead
        return dead.filter(pa.array(lie_under(self.inventory.roots, self.root, dead["root"], array(dead["image"]))))

    def locate(self, wanted: pa.Array, names: pa.Array, family: str) -> Ints:
        """Return the rows of this dataset's files by name; see `Inventory.locate`."""
        return self.inventory.locate(wanted, names, family, self.root)


def split_of(name: str) -> str:
    """Return train, val or test for a split's or a file's name: `restval` is train, `testdev` is test."""
    lower = name.lower()
    if "train" in lower or lower == "restval":
        return "train"
    if re.search("test|challenge|submission", lower):
        return "test"
    return "val" if re.search("val|dev", lower) else "train"


def read_json(path: Path, form: type | tuple[type, ...], *fields: str) -> Any:
    """Read a JSON file of a certain form (dict or list).

    Objects that have the first of `fields` keep these alone: all of a million questions would take gigabytes.

    Raises:
        UsageError: no such file, no JSON, or of another form.
    """

    def slim(content: dict[str, Any]) -> dict[str, Any]:
        return {name: content[name] for name in fields if name in content} if fields[0] in content else content

    with reading(path, "--root"):
        content = text_files.read_json(path, "--root", slim if fields else None)
        if not isinstance(content, form):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content


def annotations(images: list[tuple[Any, ...]], rows: Ints, texts: list[tuple[Any, ...]]) -> Annotations:
    """Make the tables from rows (dataset, image, name, split) with their files' rows, and rows of the schema TEXTS."""
    listed = ((*image[:3], row, image[3], None) for image, row in zip(images, rows.tolist(), strict=True))
    return Annotations(images=table(IMAGES, listed), texts=table(TEXTS, texts))
