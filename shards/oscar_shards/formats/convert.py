"""Other formats to shards: what is there, which shards it becomes, and their manifest."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from oscar_common import __version__
from oscar_common.errors import OperationError, UsageError
from oscar_common.files import check_output_folder, locked
from oscar_common.processes import each
from oscar_common.progress import meter, phase, plural
from oscar_common.vocabulary import NAMES, read_names
from oscar_shards.formats import lxmert_tsv, npz, oscar_corpus, sidecar
from oscar_shards.formats.fields import Vocabulary
from oscar_shards.formats.lines import Lines
from oscar_shards.formats.part import Part, Written, is_done, write_part
from oscar_shards.formats.rows import Rows
from oscar_shards.manifest import FILE, DetectorRecord, Layout, Manifest, PlanRecord, read_manifest, write_manifest
from oscar_shards.read import manifest_of
from oscar_shards.write import finish_shards, shard_path

NAME = "shard"
IMAGES_PER_SHARD = 1000
TRIES = 100  # rows that are looked at for P


def import_shards(
    format: str,
    source_path: Path,
    *,
    out: Path,
    source: str | None,
    classes: Path | None,
    attributes: Path | None,
    dtype: str | None,
    images_per_shard: int | None,
    workers: int | None,
) -> None:
    """Make shards of what is in another format, or go on with it.

    Raises:
        UsageError: what is asked for is not there, or other shards are in `out`.
        OperationError: rows were refused; the others are done.
    """
    if not source_path.exists():
        raise UsageError(f"FROM {source_path}: no such file or folder; give what is in the format {format}")
    if out.resolve() in (source_path.resolve(), source_path.resolve().parent):
        raise UsageError(f"--out {out}: FROM is in it; give another --out")

    check_output_folder(out, "--out", (FILE,))
    beside = sidecar.find(source_path)
    vocabulary = _vocabulary(format, source_path, classes, attributes) if beside is None else Vocabulary([], [])

    with phase(f"looking through {source_path}"):
        rows = find_rows(format, source_path, source, vocabulary, beside is None)

    if beside is not None:
        layout_fields = {"source": source, "classes": classes, "attributes": attributes, "dtype": dtype}
        manifest, parts = _same_again(format, beside, rows, out, layout_fields | {"images-per-shard": images_per_shard})
        print(f"{beside} says what the shards were, and they become the same; delete it to have the files alone read")
    else:
        if not rows.ids:
            raise UsageError(f"FROM {source_path}: there is no image in it; give a file that is not empty")
        chosen = dtype or "float16", images_per_shard or IMAGES_PER_SHARD
        manifest, parts = _anew(format, source_path, rows, out, source, vocabulary, *chosen)
        print("".join(f"{note}\n" for note in rows.notes), end="")

    with locked(out, "--out"):
        _begin(out, manifest)
        finish_shards(out)
        _write(parts, manifest.layout, out, workers)


def find_rows(format: str, path: Path, source: str | None, vocabulary: Vocabulary, with_texts: bool) -> Rows:
    """Find the images in a format.

    Raises:
        UsageError: a file is missing, or there is no image.
    """
    rows: Rows
    if format == "oscar":
        rows = oscar_corpus.read_rows(path, source, vocabulary, with_texts)
    elif format == "npz":
        rows = npz.read_rows(path, source, vocabulary)
    else:
        rows = lxmert_tsv.read_rows(path, format, source, vocabulary)

    return rows


def _vocabulary(format: str, path: Path, classes: Path | None, attributes: Path | None) -> Vocabulary:
    """Return the names that numbers stand for, where the format has numbers: those given, else those of the manifest
    beside an export, else Visual Genome's."""
    numbers = format in ("lxmert", "npz")
    manifest = manifest_of(path) if numbers else None
    known = Vocabulary(manifest.detector.classes, manifest.detector.attributes) if manifest else Vocabulary([], [])
    if numbers and not manifest:
        classes, attributes = classes or NAMES / "objects.txt", attributes or NAMES / "attributes.txt"

    return Vocabulary(
        read_names("--classes", classes, "label_to_idx") if classes else known.classes,
        read_names("--attributes", attributes, "attribute_to_idx") if attributes else known.attributes,
    )


def _same_again(format: str, beside: Path, rows: Rows, out: Path, given: dict[str, Any]) -> tuple[Manifest, list[Part]]:
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"--{name} {value}: {beside} says what the shards were; delete it, or leave out --{name}")

    images = sidecar.read_images(beside, format, rows)
    manifest = read_manifest(beside.parent, "FROM")
    parts = [
        Part(
            tar=out / tar,
            rows=rows.take(places[places >= 0]),
            places=places,
            duplicates=frozenset(),
            sidecar=(beside, group),
            known_rejects=known,
        )
        for tar, group, places, known in zip(images.tars, images.groups, images.rows, images.rejects, strict=True)
    ]
    return manifest, parts


def _anew(
    format: str,
    path: Path,
    rows: Rows,
    out: Path,
    source: str | None,
    vocabulary: Vocabulary,
    dtype: str,
    images_per_shard: int,
) -> tuple[Manifest, list[Part]]:
    width = _feature_dim(rows, path)
    count = -(-len(rows.ids) // images_per_shard)
    detector = DetectorRecord(
        name=format,
        preset="unknown",
        config="",
        weights="",
        weights_sha256="",
        classes=vocabulary.classes,
        attributes=vocabulary.attributes,
        feature_dim=width,
        dtype=dtype,
    )
    settings = {"import": format, "source": source}
    plan = PlanRecord(
        images=str(path),
        captions=None,
        num_images=len(rows.ids),
        num_texts=rows.num_texts,
        images_per_shard=images_per_shard,
        num_shards=count,
        sha256=_digest(rows, [settings, dataclasses.asdict(detector), images_per_shard]),
    )
    manifest = Manifest(
        name=NAME, detector=detector, settings=settings, plan=plan, software={"oscar_shards": __version__}
    )

    return manifest, list(_parts(rows, out, images_per_shard, count))


def _parts(rows: Rows, out: Path, images_per_shard: int, count: int) -> Iterator[Part]:
    again = _duplicates(rows)
    for number in range(count):
        places = np.arange(number * images_per_shard, min((number + 1) * images_per_shard, len(rows.ids)))
        yield Part(
            tar=shard_path(out, NAME, number),
            rows=rows.take(places),
            places=places,
            duplicates=frozenset(np.flatnonzero(again[places]).tolist()),
            misfits=rows.misfits if number == 0 else [],
        )


def _duplicates(rows: Rows) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Return which images have a source and id that an earlier one has."""
    seen: set[tuple[str, str]] = set()
    again = np.zeros(len(rows.ids), bool)
    for n, image in enumerate(zip(rows.sources, rows.ids, strict=True)):
        again[n] = bool(image[1]) and image in seen
        seen.add(image)
    return again


def _feature_dim(rows: Rows, path: Path) -> int:
    """Return P of the first row that can be read and has regions."""
    first = ""
    tries = range(min(TRIES, len(rows.ids)))
    with Lines(rows.paths) as lines:
        for row in tries:
            try:
                features = rows.read(row, lines)[0].regions.features
                if len(features):
                    return int(features.shape[1])
            except ValueError as error:
                first = first or f": {rows.name(row)}: {error}"

    raise UsageError(f"FROM {path}: none of the first {len(tries)} rows can be read as this format{first}")


def _digest(rows: Rows, settings: list[Any]) -> str:
    """Return a hash of the files, their sizes, and what was asked for."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in rows.paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
    return digest.hexdigest()


def _begin(out: Path, manifest: Manifest) -> None:
    """Write the manifest, unless it is there.

    Raises:
        UsageError: other shards are there.
    """
    if (out / FILE).exists():
        existing = read_manifest(out, "--out")
        if (existing.plan.sha256, existing.detector, existing.plan.num_images) != (
            manifest.plan.sha256,
            manifest.detector,
            manifest.plan.num_images,
        ):
            raise UsageError(
                f"--out {out}: the shards of another job are there, or its files or options were others; "
                "give another --out"
            )
    else:
        write_manifest(out, manifest)


def _write(parts: list[Part], layout: Layout, out: Path, workers: int | None) -> None:
    """Write the shards that are not there.

    Raises:
        OperationError: rows were refused.
    """
    remaining = [part for part in parts if not is_done(part)]
    total = sum(len(p.places) for p in parts)
    done = total - sum(len(p.places) for p in remaining)
    written: dict[str, Written] = {}

    with meter("images", total, done) as progress:
        for (part, _), result in each(write_part, [(part, layout) for part in remaining], workers):
            written[part.tar.name] = result
            done += len(part.places)
            progress.show(done, sum(w.rejects for w in written.values()))

    refused = sum(w.rejects for w in written.values())
    images = total - sum(w.refused_images for w in written.values())
    print(f"{out}: {plural(len(parts), 'shard')}, {plural(images, 'image')}")
    if refused:
        path, message = next(written[p.tar.name].first for p in remaining if written[p.tar.name].rejects)
        raise OperationError(
            f"{refused:,} rows were refused, the first: {path}: {message}; all are named in {out}/*.rejects.parquet"
        )
