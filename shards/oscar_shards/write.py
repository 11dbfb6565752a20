"""Samples to a shard: a plain webdataset tar, its Parquet index, and the rejects, each whole or absent."""

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from oscar_common import __version__
from oscar_common.errors import UsageError
from oscar_common.files import TEMPORARY, check_output_folder, rename, temporary, unfinished
from oscar_common.sample import KEY_BYTES, Regions, Sample
from oscar_shards import manifest
from oscar_shards.index import index_path, index_tar, size_said, write_unfinished_index
from oscar_shards.manifest import (
    JOB_FILE,
    LEFT_OUT_FILE,
    MISSING_FILE,
    PLAN_FILE,
    DetectorRecord,
    Layout,
    Manifest,
    PlanRecord,
    write_manifest,
)
from oscar_shards.quantise import FLOAT16_LIMIT, are_finite, quantise
from oscar_shards.seal import write_sealed


@dataclass(frozen=True, kw_only=True)
class Reject:
    """An image that was refused: a one-word reason to count by, and what the reader said."""

    path: str
    reason: str
    message: str


REJECTS = pa.schema([("path", pa.string()), ("reason", pa.string()), ("message", pa.string())])


def shard_path(folder: Path, name: str, number: int) -> Path:
    """Return FOLDER/NAME-000042.tar."""
    return folder / f"{name}-{number:06d}.tar"


def rejects_path(tar: Path) -> Path:
    """Return the file of refused images that lies next to a tar, if any were."""
    return tar.with_suffix(".rejects.parquet")


def write_shard(tar: Path, items: Iterable[Sample | Reject], layout: Layout) -> None:
    """Write one shard from samples and rejects, in their order; nothing takes its name before all of it is on disk.

    A shard that is already there is replaced. If this is killed between two names, `finish_shards` gives the others.

    The bytes are a function of `items` and `layout` alone: integer mtime 0, no pax headers, no clock, no host name.

    Raises:
        ValueError: a sample does not fit the layout: shapes, dtypes, numbers that are not finite or too large, too many
            regions.
    """
    from webdataset import TarWriter  # it loads torch, which those who only plan and watch do without

    rejects: list[Reject] = []
    refused, index = rejects_path(tar), index_path(tar)

    try:
        with unfinished(tar) as file, TarWriter(file, mtime=0, encoder=False) as writer:
            for item in items:
                if isinstance(item, Reject):
                    rejects.append(item)
                else:
                    _write_sample(writer, item, layout)

        with unfinished(refused) as file:
            write_sealed(pa.Table.from_pylist([dataclasses.asdict(r) for r in rejects], REJECTS), file)

        write_unfinished_index(index_tar(temporary(tar)), index)
    except BaseException:
        for path in (index, refused, tar):
            temporary(path).unlink(missing_ok=True)
        raise

    rename(tar)
    _finish(tar)


def _finish(tar: Path) -> None:
    """Give what belongs to a tar that has its final name theirs: rejects, if there are any, and the index last."""
    refused = rejects_path(tar)
    if temporary(refused).exists():
        if pq.read_metadata(temporary(refused)).num_rows:
            rename(refused)
        else:
            refused.unlink(missing_ok=True)
            temporary(refused).unlink()

    rename(index_path(tar))


def finish_shards(folder: Path) -> None:
    """Finish shards whose writers were killed just after the tar had got its name; nobody else may be writing there.

    They were whole on disk before, with rejects and index: a shard that was to be written once more is the old one
    until its tar has its name, and the new one from then on.
    """
    for unnamed in sorted(folder.glob(f"{TEMPORARY}*.parquet")):
        tar = folder / f"{unnamed.name.removeprefix(TEMPORARY).removesuffix('.parquet')}.tar"
        if temporary(tar).exists() or not tar.exists():
            continue
        with suppress(OSError, ValueError, pa.ArrowException):  # another file, or one that a power cut hit
            if size_said(pq.read_schema(unnamed)) == tar.stat().st_size:
                _finish(tar)


def write_folder(
    folder: str | Path,
    samples: Iterable[Sample],
    detector: DetectorRecord,
    *,
    name: str = "shard",
    images_per_shard: int = 1000,
) -> Manifest:
    """Write samples to a new folder of shards, with its manifest.

    The samples are taken one at a time, so a generator may make them. The manifest is written last, and `open_folder`
    and oscar-train refuse a folder that has none. If a sample is refused, delete the folder and write it again.

    Args:
        folder: a new or an empty folder.
        samples: each with a key of its own, made by `oscar_common.make_key`.
        detector: what the features come from. Its `feature_dim` is P; its `dtype` says how features are stored.
        name: the first part of the shards' names.
        images_per_shard: how many samples a shard has; the last one may have fewer.

    Raises:
        UsageError: the folder holds other files, or cannot be written.
        ValueError: there is no sample, a key is unsafe or occurs twice, a sample does not fit (see `write_shard`), or
            `name` or `images_per_shard` cannot be.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"name {name!r}: allowed are letters, digits, - and _")
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard {images_per_shard}: at least 1")

    folder = Path(folder)
    check_output_folder(folder, "folder", ())
    folder.mkdir(parents=True, exist_ok=True)
    layout = Layout(feature_dim=detector.feature_dim, dtype=detector.dtype)
    digest = hashlib.sha256()
    keys: set[str] = set()
    num_texts = num_shards = 0

    def checked_samples() -> Iterator[Sample]:
        nonlocal num_texts
        for sample in samples:
            _check_key(sample.key, keys)
            keys.add(sample.key)
            num_texts += len(sample.texts)
            digest.update(f"{sample.key}\0".encode() + sample_json(sample))
            yield sample

    unwritten = checked_samples()
    for first in unwritten:
        of_shard = chain([first], islice(unwritten, images_per_shard - 1))
        write_shard(shard_path(folder, name, num_shards), of_shard, layout)
        num_shards += 1

    if not keys:
        raise ValueError(f"{folder}: there is no sample to write")

    plan = PlanRecord(
        images="",
        captions=None,
        num_images=len(keys),
        num_texts=num_texts,
        images_per_shard=images_per_shard,
        num_shards=num_shards,
        sha256=digest.hexdigest(),
    )
    record = Manifest(name=name, detector=detector, settings={}, plan=plan, software={"oscar_shards": __version__})
    write_manifest(folder, record)
    return record


def _check_key(key: str, others: set[str]) -> None:
    """Refuse a key that is not one of a sample's own, or that readers would take for another one's.

    Raises:
        ValueError: in one line.
    """
    if not re.fullmatch(rf"[A-Za-z0-9_%-]{{1,{KEY_BYTES}}}", key):
        raise ValueError(f"key {key!r}: allowed are letters, digits, _, - and %; make it with oscar_common.make_key")
    if key in others:
        raise ValueError(f"key {key!r}: another sample has it; two images never share a key")


def _write_sample(writer: Any, sample: Sample, layout: Layout) -> None:
    regions, k = sample.regions, len(sample.regions.boxes)
    if layout.max_boxes is not None and k > layout.max_boxes:
        raise ValueError(f"{sample.key}: {k} regions; the manifest has at most {layout.max_boxes}")

    for name, array, shape, dtypes in (
        ("boxes", regions.boxes, (k, 4), (np.float32,)),
        ("features", regions.features, (k, layout.feature_dim), (np.float16, np.float32)),
        ("scores", np.asarray(regions.scores, float), (len(regions.tags),), (np.float64,)),
        ("tags", np.asarray(regions.tags or [""] * k), (k,), None),
    ):
        if array.shape != shape or (dtypes and array.dtype not in dtypes):
            expected = f"{np.dtype(dtypes[0])} {shape}" if dtypes else shape
            raise ValueError(f"{sample.key}: {name} are {array.dtype} {array.shape}, not {expected}")

    if unfit := unfit_numbers(regions):
        raise ValueError(f"{sample.key}: {unfit[1]}")

    # One call a member: TarWriter would sort them by name, and the contract has the JSON first.
    writer.write({"__key__": sample.key, "json": sample_json(sample)})
    for name, array in ({"boxes": regions.boxes} | _stored(regions.features, layout.dtype)).items():
        writer.write({"__key__": sample.key, f"{name}.npy": _npy(array)})


def unfit_numbers(regions: Regions) -> tuple[str, str] | None:
    """Return why regions cannot be stored, as a reason to count by and a message, or None.

    What float16 cannot hold, int8 may not either: it becomes float16 when it is read.
    """
    features = regions.features
    if not are_finite(regions.boxes):
        return "not-finite", "a box is not finite"
    if not are_finite(features):
        beyond = ", or too large for float16, whose largest is 65504" * (features.dtype == np.float16)
        return "not-finite", f"a feature is not finite{beyond}"
    if features.dtype != np.float16 and (most := float(np.abs(features).max(initial=0))) >= FLOAT16_LIMIT:
        return "too-large", f"a feature of {most:g} is too large for float16, whose largest is 65504"

    scores = [*regions.scores, *(a.score for of_region in regions.attributes for a in of_region)]
    if not are_finite(np.array(scores, np.float32)):
        return "not-finite", "a score is not finite"

    return None


def _stored(features: npt.NDArray[Any], dtype: str) -> dict[str, npt.NDArray[Any]]:
    """Return features as the members that hold them."""
    if dtype == "float16":
        return {"features": features.astype(np.float16, copy=False)}
    values, scales = quantise(features)
    return {"scales": scales, "features": values}


def sample_json(sample: Sample) -> bytes:
    """Return the content of KEY.json: image, tags, scores, attributes, gt_tags if there are any, texts.

    Fields that are None are left out.
    """
    content: dict[str, Any] = {
        "image": dataclasses.asdict(sample.image),
        "tags": sample.regions.tags,
        "scores": sample.regions.scores,
        "attributes": [[vars(a) for a in of_region] for of_region in sample.regions.attributes],
        **({"gt_tags": sample.gt_tags} if sample.gt_tags else {}),
        "texts": [{k: v for k, v in dataclasses.asdict(t).items() if v is not None} for t in sample.texts],
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def remove_shards(folder: Path) -> None:
    """Delete the shards that a folder's manifest names, with all that is written beside them, and then the manifest.

    Raises:
        UsageError: the manifest is damaged, or of tars that others may have written.
    """
    if not (folder / manifest.FILE).exists():
        return

    made = manifest.read_manifest(folder, "--overwrite")
    if not made.name or not made.plan.sha256:
        raise UsageError(
            f"--overwrite: the tars in {folder} were indexed there, and others may have written them; delete them, "
            "or give another --out"
        )

    for path in sorted(folder.iterdir()):
        if _is_written(path.name, made):
            path.unlink()

    (folder / manifest.FILE).unlink()  # last: if this is killed, the folder is still known to be one of shards


def _is_written(name: str, made: manifest.Manifest) -> bool:
    """Whether a file's name is one that a job gives to what it writes; of three shards `NAME-202401.parquet` is not."""
    name = name.removeprefix(TEMPORARY)
    if name in (PLAN_FILE, JOB_FILE, LEFT_OUT_FILE, MISSING_FILE):
        return True

    of_shard = re.fullmatch(rf"{re.escape(made.name)}-([0-9]+)\.(tar|parquet|rejects\.parquet|decoding)", name)
    if of_shard is None or int(of_shard[1]) >= made.plan.num_shards:
        return False

    return name.startswith(f"{shard_path(Path(), made.name, int(of_shard[1])).stem}.")
