"""manifest.json: which detector, settings and plan made a folder of shards."""

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oscar_common.config import parse
from oscar_common.errors import UsageError
from oscar_common.files import replacing
from oscar_shards.seal import sealed_json

FILE = "manifest.json"
FORMAT = 1
PLAN_FILE = "_plan.parquet"  # what oscar-extract is to do; readers of Parquet folders pass over names with _
JOB_FILE = "_job.json"  # its settings, for processes that join it with nothing but the folder
LEFT_OUT_FILE = "_left-out.parquet"  # what it could not even begin with: missing images, texts without an image, ...
MISSING_FILE = "_missing.parquet"  # the same of a job that was refused because too much of it was missing


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What every sample of a folder must fit: at most `max_boxes` regions of `feature_dim` (P) numbers each."""

    feature_dim: int
    dtype: str = "float16"  # or "int8", each row with a scale
    max_boxes: int | None = None


@dataclass(frozen=True, kw_only=True)
class DetectorRecord:
    """What decides the numbers in a shard: the model, its weights, and the numerics preset."""

    name: str
    preset: str
    config: str  # the detectron2 config, as YAML
    weights: str  # file name
    weights_sha256: str
    classes: list[str]
    attributes: list[str] = field(default_factory=list)
    feature_dim: int  # P
    dtype: str = "float16"  # how features are stored


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """What is extracted. `sha256` covers every image path, key and text in order, and so the content of each shard."""

    images: str
    captions: str | None
    num_images: int
    num_texts: int
    num_duplicates: int = 0  # files whose bytes are those of a planned image, which has their texts
    num_missing: int = 0  # images that a dataset names, without a file; and about how many damaged tars have lost
    images_per_shard: int
    num_shards: int
    sha256: str

    def images_in(self, shard: int) -> int:
        """Return how many images are planned for a shard."""
        return min(self.images_per_shard, self.num_images - shard * self.images_per_shard)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json."""

    format_version: int = FORMAT
    name: (
        str  # of the shards: NAME-000000.tar; empty if they are called otherwise, and all tars of the folder are meant
    )
    detector: DetectorRecord
    settings: dict[str, Any]
    plan: PlanRecord
    software: dict[str, Any] = field(default_factory=dict)
    seal: str | None = None  # of the file (see seal.py); older versions wrote none

    @property
    def layout(self) -> Layout:
        """What every sample must fit."""
        most = self.settings.get("max_boxes")
        return Layout(
            feature_dim=self.detector.feature_dim,
            dtype=self.detector.dtype,
            max_boxes=most if isinstance(most, int) else None,
        )

    def tars(self, folder: Path) -> list[Path]:
        """Return the shards that are in `folder`, in their order."""
        return in_order(path for path in folder.glob("*.tar") if re.fullmatch(self._of_tar, path.name))

    def tar_names(self, found: Iterable[str]) -> list[str]:
        """Return the names of the tars among some file names, in their order, those of which only the index is there
        included."""
        names = list(found)
        of_index = rf"({re.escape(self.name)}-\d{{6,}})\.parquet"
        tars = {name for name in names if re.fullmatch(self._of_tar, name)}
        indexed = {f"{match[1]}.tar" for match in (re.fullmatch(of_index, name) for name in names) if match}
        return [path.name for path in in_order(map(Path, tars | indexed))]

    @property
    def _of_tar(self) -> str:
        """A pattern of the shards' names; NAME-x-000000.tar is one of another set."""
        return rf"{re.escape(self.name)}-\d{{6,}}\.tar" if self.name else r"[^.].*\.tar"


def in_order(paths: Iterable[Path]) -> list[Path]:
    """Return shards by name, and by number where they have one: the millionth has a digit more."""

    def place(path: Path) -> tuple[str, int, str]:
        numbered = re.fullmatch(r"(.*-)(\d{6,})\.tar", path.name)
        return (numbered[1], int(numbered[2]), path.name) if numbered else (path.name, 0, path.name)

    return sorted(paths, key=place)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into `folder`, whole or not at all."""
    with replacing(folder / FILE) as file:
        file.write(sealed_json(dataclasses.asdict(manifest)))


def read_manifest(folder: Path, flag: str) -> Manifest:
    """Read manifest.json of `folder`, which `flag` named.

    Raises:
        UsageError: it is missing, damaged, or of a later format.
    """
    path = folder / FILE
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(
            f"{flag} {folder}: no {FILE} in it; give a folder of shards made by oscar-extract; for tars of others, "
            f"first run: oscar-shards index {folder}"
        ) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None

    return parse_manifest(raw, str(path))


def parse_manifest(raw: bytes, path: str) -> Manifest:
    """Parse the content of a manifest.json; `path` is for messages.

    Raises:
        UsageError: it is damaged, or of a later format.
    """
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        again = "restore it from a copy, or delete it and run oscar-shards index on the folder"
        raise UsageError(f"{path}: not valid JSON ({error}); {again}") from None

    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT:
        raise UsageError(f"{path}: format_version {version!r}; this version reads {FORMAT}")

    manifest = parse(Manifest, content, path)
    if not re.fullmatch(r"[\w-]*", manifest.name):
        raise UsageError(f"{path}: name {manifest.name!r}; allowed are letters, digits, - and _")

    return manifest
