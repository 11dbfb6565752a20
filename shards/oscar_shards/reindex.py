"""Indexes rebuilt from tars, and a manifest for tars that come from elsewhere."""

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oscar_common.errors import OperationError, UsageError
from oscar_common.files import check_writable
from oscar_common.processes import each
from oscar_common.progress import meter, plural
from oscar_common.text_files import read_text, split_lines
from oscar_shards.index import index_path, index_tar, write_index
from oscar_shards.manifest import DetectorRecord, Manifest, PlanRecord, write_manifest
from oscar_shards.pages.page import size
from oscar_shards.read import manifest_of, tars_at

MEGA = 1_000_000
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Indexed:
    """A tar whose index is written, or what is wrong with it."""

    images: int
    fault: str = ""


def reindex(paths: Iterable[Path], classes: Path | None, workers: int | None) -> None:
    """Write the index of each tar, and a manifest.json into each folder that has none.

    Raises:
        UsageError: a path has no tar, or `classes` cannot be read.
        OperationError: a tar is damaged, or not one of shards; the others are done.
    """
    began = time.monotonic()
    names = read_lines(classes) if classes else []
    tars = list(dict.fromkeys(tar for path in paths for tar in tars_at(path)))

    for folder in dict.fromkeys(tar.parent for tar in tars):
        check_writable(folder, f"PATH {folder}", "PATH")

    sizes = {tar: tar.stat().st_size for tar in tars}
    images = done = 0
    faults: list[str] = []

    with meter("MB", sum(sizes.values()) // MEGA, refusal="faults") as progress:
        for tar, indexed in each(index_one, tars, workers):
            images, done = images + indexed.images, done + sizes[tar]
            faults.extend([f"{tar}: {indexed.fault}"] if indexed.fault else [])
            progress.show(done // MEGA, len(faults))

    if faults:
        raise OperationError(f"{faults[0]}; {len(faults)} of {len(tars)} tars could not be indexed")

    for folder in dict.fromkeys(tar.parent for tar in tars):
        if manifest_of(folder) is None:
            write_manifest(folder, manifest_from(folder, names))
            print(f"{folder / 'manifest.json'}: written, for tars of an unknown detector")

    rate = size(sum(sizes.values()) / max(time.monotonic() - began, 1e-9))
    print(f"{plural(len(tars), 'index', 'indexes')}, {plural(images, 'image')}, {rate}/s")


def index_one(tar: Path) -> Indexed:
    """Write the index of one tar."""
    try:
        table = index_tar(tar)
    except ValueError as error:
        return Indexed(0, str(error))
    write_index(table, index_path(tar))
    return Indexed(len(table))


def manifest_from(folder: Path, classes: list[str]) -> Manifest:
    """Return a manifest that says of indexed tars what can be seen in them.

    Raises:
        UsageError: a tar has no index, or they have not all the same P and dtype.
    """
    tars = tars_at(folder)
    layouts: dict[tuple[int, str], Path] = {}
    images, texts = [], 0

    for tar in tars:
        try:
            table = pq.read_table(index_path(tar), columns=["num_boxes", "features_bytes", "scales_offset", "texts"])
        except (OSError, ValueError):
            raise UsageError(
                f"PATH {folder}: no manifest.json without all indexes: run: oscar-shards index {folder}"
            ) from None

        images.append(len(table))
        texts += pc.sum(pc.list_value_length(table["texts"])).as_py() or 0
        counts, sizes = table["num_boxes"].to_numpy(), table["features_bytes"].to_numpy()
        integers = table["scales_offset"].is_valid().to_numpy()
        wide = sizes[counts > 0] // counts[counts > 0] // np.where(integers[counts > 0], 1, 2)

        for width, integer in set(zip(wide.tolist(), integers[counts > 0].tolist(), strict=True)):
            layouts.setdefault((width, "int8" if integer else "float16"), tar)

    if len(layouts) > 1:
        listed = ", ".join(f"{dtype} with P = {width} ({tar.name})" for (width, dtype), tar in layouts.items())
        raise UsageError(f"PATH {folder}: features of more than one kind: {listed}; put them into folders of their own")

    width, dtype = next(iter(layouts), (0, "float16"))
    detector = DetectorRecord(
        name=UNKNOWN,
        preset=UNKNOWN,
        config="",
        weights="",
        weights_sha256="",
        classes=classes,
        feature_dim=width,
        dtype=dtype,
    )
    plan = PlanRecord(
        images=UNKNOWN,
        captions=None,
        num_images=sum(images),
        num_texts=texts,
        images_per_shard=max(images),
        num_shards=len(tars),
        sha256="",
    )
    return Manifest(name=_name(tars), detector=detector, settings={}, plan=plan)


def _name(tars: list[Path]) -> str:
    """Return NAME if the tars are NAME-000000.tar and so on, else an empty one."""
    names = {match[1] if (match := re.fullmatch(r"([\w-]+)-\d{6,}\.tar", tar.name)) else "" for tar in tars}
    return names.pop() if len(names) == 1 else ""


def read_lines(path: Path) -> list[str]:
    """Return the names of `--classes`, one a line, as they stand: other people's tags may have capitals and commas.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return [line.strip() for line in split_lines(read_text(path, "--classes")) if line.strip()]
    except OSError as error:
        raise UsageError(f"--classes {path}: cannot be read ({error.strerror}); give one name a line") from None
