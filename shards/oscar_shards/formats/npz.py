"""MILVLG's files of bottom-up attention: an .npz an image. Nothing in them is unpickled."""

import os
import struct
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from oscar_common.errors import UsageError
from oscar_common.files import no_folder
from oscar_common.sample import Attribute, Sample, make_key
from oscar_shards.formats.fields import Ints, Refused, Vocabulary, attributes_of, free_id, names_of, numbers_of
from oscar_shards.formats.lines import LINE_LIMIT, Lines
from oscar_shards.formats.rows import make_sample
from oscar_shards.samples import NPY_LIMIT, parse_npy_header
from oscar_shards.write import Reject

LIMIT = LINE_LIMIT  # bytes of an array
# What zipfile raises besides ValueError; RuntimeError where a password is asked for
DAMAGES = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OverflowError, NotImplementedError, RuntimeError)
INFO = (
    "`info` in these files is a pickled Python object, which could run any code and is never loaded: tags and scores "
    "that are in it are left out"
)


@dataclass(frozen=True, kw_only=True)
class NpzRows:
    """A folder's files; see `oscar_shards.formats.rows.Rows`."""

    paths: list[Path]
    ids: list[str]
    sources: list[str]
    vocabulary: Vocabulary
    notes: list[str]
    num_texts: int = 0
    misfits: list[Reject] = field(default_factory=list)

    @property
    def file(self) -> Ints:
        """Which of `paths` has each image."""
        return np.arange(len(self.paths))

    def take(self, rows: Ints) -> "NpzRows":
        """Return some of the files."""
        paths, ids, sources = ([some[n] for n in rows.tolist()] for some in (self.paths, self.ids, self.sources))
        return replace(self, paths=paths, ids=ids, sources=sources)

    def name(self, row: int) -> str:
        """Return the name of a file."""
        return self.paths[row].name

    def read(self, row: int, lines: Lines) -> tuple[Sample, list[Reject]]:
        """Read an image; its features are float16 or float32 [K, P].

        Raises:
            Refused: it is damaged.
        """
        try:
            with zipfile.ZipFile(self.paths[row]) as archive:
                return self._sample(row, archive), []
        except DAMAGES as error:
            raise Refused("zip", f"a damaged .npz ({error})") from None
        except OSError as error:
            raise Refused("unreadable", f"cannot be read: {error.strerror or error}") from None

    def _sample(self, row: int, archive: zipfile.ZipFile) -> Sample:
        width, height = (_number(archive, name) for name in ("image_w", "image_h"))
        boxes, features = _array(archive, "bbox"), _array(archive, "x")
        k = len(boxes) if boxes.ndim else 0
        if boxes.shape != (k, 4) or features.ndim != 2 or len(features) != k:
            raise Refused("shape", f"bbox is {list(boxes.shape)} and x {list(features.shape)}, not [K, 4] and [K, P]")
        if "num_bbox.npy" in archive.namelist() and _number(archive, "num_bbox") != k:
            raise Refused("shape", f"num_bbox is not the number of boxes, {k}")

        for name, array in (("bbox", boxes), ("x", features)):
            if array.dtype.kind != "f":
                raise Refused("dtype", f"{name} is {array.dtype}; allowed are floating-point numbers")

        tags: list[str] = []
        scores: list[float] = []
        attributes: list[list[Attribute]] = []
        if self.vocabulary.classes and "objects_id.npy" in archive.namelist():
            tags = names_of(_list(archive, "objects_id", k).astype(np.int64), self.vocabulary.classes, "class")
            scores = _list(archive, "objects_conf", k).astype(float).tolist() if tags else []

        if self.vocabulary.attributes and "attrs_id.npy" in archive.namelist():
            numbers, surely = _list(archive, "attrs_id", k).astype(np.int64), _list(archive, "attrs_conf", k)
            attributes = attributes_of(numbers, surely.astype(np.float32), self.vocabulary.attributes)

        sizes = width, height
        floats = features if features.dtype.itemsize == 2 else features.astype(np.float32)
        return make_sample(
            self.ids[row], self.sources[row], sizes, boxes.astype(np.float32), floats, tags, scores, attributes, []
        )


def _number(archive: zipfile.ZipFile, name: str) -> int:
    array = _array(archive, name)
    if array.size != 1 or array.dtype.kind not in "iuf" or not float(array.item()).is_integer():
        raise Refused("number", f"{name} is no whole number")
    return int(array.item())


def _list(archive: zipfile.ZipFile, name: str, count: int) -> npt.NDArray[Any]:
    array = _array(archive, name)
    if array.shape != (count,) or array.dtype.kind not in "iuf":
        raise Refused("shape", f"{name} is {array.dtype} {list(array.shape)}, not {count} numbers")
    return array


def _array(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    """Read an array of an .npz, of a size that is known before anything is unpacked.

    Raises:
        Refused: it is missing, too large, of Python objects, or damaged.
    """
    try:
        entry = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise Refused("missing", f"no {name} in it") from None

    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Refused("zip", f"{name} is compressed in another way than numpy does")
    if entry.file_size > LIMIT:
        raise Refused("too-long", f"{name} of {entry.file_size:,} bytes; at most {LIMIT:,} are read")

    with archive.open(entry) as member:
        start = member.read(12)
        if start[:6] != b"\x93NUMPY" or len(start) < 12 or start[6] not in (1, 2):
            raise Refused("npy", f"{name} is no .npy file of version 1 or 2")

        width = 2 if start[6] == 1 else 4
        rest = 8 + width + int.from_bytes(start[8 : 8 + width], "little") - len(start)
        if not 0 <= rest <= NPY_LIMIT:
            raise Refused("npy", f"{name} has an .npy header of {rest + len(start):,} bytes; at most {NPY_LIMIT:,}")

        try:
            shape, dtype = parse_npy_header(start + member.read(rest))
        except ValueError as error:
            raise Refused("npy", f"{name}: {error}") from None

        size = prod(shape) * np.dtype(dtype).itemsize
        if size != entry.file_size - rest - len(start):
            raise Refused("npy", f"{name}: {dtype} {list(shape)} has {size:,} bytes, not as many as are there")

        raw = member.read(size)

    if len(raw) != size:
        raise Refused("truncated", f"{name} is cut")

    return np.frombuffer(raw, dtype).reshape(shape)


def read_rows(path: Path, source: str | None, vocabulary: Vocabulary) -> NpzRows:
    """Find the .npz files of a folder, in the order of their names.

    Raises:
        UsageError: there is none.
    """
    if not path.is_dir():
        raise UsageError(f"FROM {path}: {no_folder(path)}; give the folder with MILVLG's .npz files")

    with os.scandir(path) as entries:
        names = sorted(e.name for e in entries if e.name.endswith(".npz") and not e.name.startswith("."))

    if not names:
        raise UsageError(f"FROM {path}: no .npz file in it; give the folder with MILVLG's .npz files")

    paths = [path / name for name in names]
    return NpzRows(
        paths=paths,
        ids=[name.removesuffix(".npz") for name in names],
        sources=[source or path.stem] * len(names),
        vocabulary=vocabulary,
        notes=[INFO] if _has_info(paths[0]) else [],
    )


def _has_info(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return "info.npy" in archive.namelist()
    except (OSError, ValueError, *DAMAGES):
        return False


class NpzWriter:
    """Writes samples as .npz files into a folder, with plain arrays where MILVLG's have `info`."""

    def __init__(self, folder: Path, vocabulary: Vocabulary) -> None:
        self._folder = folder
        self._vocabulary = vocabulary
        self._ids: set[str] = set()
        self._texts = 0

    def add(self, sample: Sample) -> tuple[str, str]:
        """Write a sample and return the file and id that it has there."""
        self._texts += len(sample.texts)
        image, regions = sample.image, sample.regions
        id = free_id(self._ids, make_key(image.id), make_key(f"{image.source}/{image.id}"), make_key(sample.key))
        self._ids.add(id)
        arrays: dict[str, Any] = dict(
            x=regions.features.astype(np.float32),
            bbox=regions.boxes,
            num_bbox=np.int64(len(regions.boxes)),
            image_h=np.int64(image.height),
            image_w=np.int64(image.width),
            **numbers_of(regions, self._vocabulary),
        )
        np.savez(self._folder / f"{id}.npz", **arrays)

        return f"{id}.npz", id

    def close(self) -> list[str]:
        """Return what people should know, a line each."""
        return [f"{self._texts:,} texts are not in the files: the format has none"] if self._texts else []
