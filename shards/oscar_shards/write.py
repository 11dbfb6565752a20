"""Samples to a shard: a plain webdataset tar, its Parquet index, and the rejects, each whole or absent."""

import dataclasses
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from oscar_common.files import TEMPORARY, replacing, temporary
from oscar_common.sample import Regions, Sample
from oscar_shards import manifest
from oscar_shards.index import index_path, index_tar, write_index
from oscar_shards.manifest import Layout
from oscar_shards.quantise import FLOAT16_LIMIT, are_finite, quantise

PLAN_FILE = "_plan.parquet"  # what oscar-extract is to do; readers of Parquet folders pass over names with _
LEFT_OUT_FILE = "_left-out.parquet"  # what it could not even begin with: missing images, texts without an image, ...
WRITTEN = re.compile(
    rf"({re.escape(TEMPORARY)})?([\w-]+-\d{{6}}\.(tar|parquet|rejects\.parquet|decoding)|{PLAN_FILE}|{LEFT_OUT_FILE})"
)


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
    """Write one shard from samples and rejects, in their order; the tar takes its final name last.

    The bytes are a function of `items` and `layout` alone: integer mtime 0, no pax headers, no clock, no host name.

    Raises:
        ValueError: a sample does not fit the layout: shapes, dtypes, numbers that are not finite or too large, too many
            regions.
    """
    from webdataset import TarWriter  # it loads torch, which those who only plan and watch do without

    rejects: list[Reject] = []
    with replacing(tar) as file:
        with TarWriter(file, mtime=0, encoder=False) as writer:
            for item in items:
                if isinstance(item, Reject):
                    rejects.append(item)
                else:
                    _write_sample(writer, item, layout)
        file.flush()
        write_index(index_tar(temporary(tar)), index_path(tar))
        _write_rejects(rejects_path(tar), rejects)


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


def _write_rejects(path: Path, rejects: list[Reject]) -> None:
    if not rejects:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as file:
        pq.write_table(pa.Table.from_pylist([dataclasses.asdict(r) for r in rejects], REJECTS), file)


def remove_shards(folder: Path) -> None:
    """Delete all that this module wrote into a folder that has a manifest, and then the manifest; nothing else."""
    if not (folder / manifest.FILE).exists():
        return
    for path in sorted(folder.iterdir()):
        if WRITTEN.fullmatch(path.name):
            path.unlink()
    (folder / manifest.FILE).unlink()  # last: if this is killed, the folder is still known to be one of shards
