"""Photos as shards have them, with or without texts: their regions and tags, ready for a model."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from xxhash import xxh3_64_hexdigest

from oscar_common.errors import OperationError, UsageError
from oscar_common.files import cache_folder, no_folder, sha256, temporary
from oscar_shards.read import ShardFolder, open_folder
from oscar_train.batch import Batch
from oscar_train.data.batch_buffer import make_batch_buffer
from oscar_train.data.reading.photo import read_regions
from oscar_train.data.texts.ragged import Ints, Ragged
from oscar_train.data.texts.tags import Tagging
from oscar_train.predict.model import TaskModel
from oscar_train.tasks.texts import rows_from


@dataclass(frozen=True, kw_only=True)
class Photos:
    """N photos. table: a row each, the columns of an index, `folder` (which of `folders`) and `shard` among them.

    tags: the tokens of each photo's tags, as the model sees them.
    """

    folders: tuple[ShardFolder, ...]
    table: pa.Table
    tags: Ragged

    def __len__(self) -> int:
        return len(self.table)

    def row(self, photo: int) -> tuple[Path, dict[str, Any]]:
        """Return the tar of a photo, and its row of the index."""
        row = self.table.slice(photo, 1).to_pylist()[0]
        return self.folders[row["folder"]].tars[row["shard"]], row

    def find_file(self, path: Path) -> int | None:
        """Return the photo that is this file, by its bytes; of a file that is not there, see `find`."""
        if not path.is_file():
            return self.find(str(path))
        hashes: list[str] = self.table["sha256"].to_pylist()
        content = sha256(path)
        return hashes.index(content) if content in hashes else None

    def find(self, name: str) -> int | None:
        """Return the photo with this key, path or file name; None if there is none."""
        for column in ("key", "path"):
            values: list[str] = self.table[column].to_pylist()
            if name in values:
                return values.index(name)
        names = [str(path).rpartition("/")[2] for path in self.table["path"].to_pylist()]
        return names.index(Path(name).name) if names.count(Path(name).name) == 1 else None


def open_photos(places: str | Path | Sequence[str | Path], model: TaskModel, flag: str = "--shards") -> Photos:
    """Open folders of shards for a model.

    Raises:
        UsageError: a folder is missing or unfinished, or the model is for other features.
    """
    folders_given = [places] if isinstance(places, str | Path) else places
    folders = tuple(open_folder(Path(place), flag) for place in folders_given)
    for folder in folders:
        feature_dim = folder.manifest.detector.feature_dim
        if feature_dim != model.feature_dim:
            raise UsageError(
                f"{flag} {folder.folder}: its regions have {feature_dim} features, the model is for "
                f"{model.feature_dim}; give shards of the detector that the model was trained with"
            )

    tables = [f.table.append_column("folder", pa.array(np.full(len(f.table), n))) for n, f in enumerate(folders)]
    table = pa.concat_tables(tables).combine_chunks()
    tagging = Tagging(model.tokenizer, model.tags, model.shape.text)
    batches = table.to_batches()
    tags = [tagging(batch)[0] for batch in batches]
    joined = Ragged(
        np.concatenate([np.zeros(0, np.int32), *(part.values for part in tags)]),
        np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *(part.lengths for part in tags)]))]),
    )

    return Photos(folders=folders, table=table, tags=joined)


def make_batch(model: TaskModel, photos: Photos, which: Ints, text: Ragged) -> Batch:
    """Return rows of some photos, each beside its text: `text` has as many rows, or one for all.

    Raises:
        OperationError: a photo's regions cannot be read.
    """
    batch = make_batch_buffer(len(which), model.feature_dim, shape=model.shape).batch
    for row, photo in enumerate(which.tolist()):
        tar, entry = photos.row(photo)
        if not entry["num_boxes"]:
            continue

        features, z = read_regions(tar, entry, model.shape.regions)
        count = len(features)
        batch.features[row, :count], batch.z[row, :count] = features, z
        batch.region_mask[row, :count] = True

    lines = np.arange(len(which)) if len(text) == len(which) else np.zeros(len(which), np.int64)
    w, len_w = text.padded(lines, model.shape.tokens)
    q, len_q = photos.tags.padded(which, model.shape.tokens)
    rows = rows_from(model.tokenizer, w, len_w, q, len_q, model.shape.tokens)

    for name in ("input_ids", "token_type_ids", "attention_mask", "mlm_labels", "match_labels"):
        getattr(batch, name)[:] = torch.from_numpy(np.asarray(getattr(rows, name)))

    return batch


def extract(images: Path, cache: Path | None, detector: str, flag: str = "--images") -> Path:
    """Extract a folder of photos, or one photo, into the cache, by oscar-extract; return the folder of shards.

    A folder whose files have not changed since is not extracted again.

    Raises:
        UsageError: no such folder. OperationError: oscar-extract failed; it has said why.
    """
    if not images.exists():
        raise UsageError(f"{flag} {images}: {no_folder(images)}; give a folder of photos, or --shards")

    files = sorted(path for path in images.rglob("*") if path.is_file()) if images.is_dir() else [images]
    stamp = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    name = xxh3_64_hexdigest(json.dumps([str(images.resolve()), detector, stamp]).encode())
    out = cache_folder(cache) / "photos" / name
    source = images
    if images.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        source = out.with_suffix(".jsonl")
        unfinished = temporary(source)
        unfinished.write_text(json.dumps({"path": str(images.resolve())}) + "\n")
        unfinished.replace(source)

    line = [sys.executable, "-m", "oscar_extract", "--images", str(source), "--out", str(out), "--detector", detector]
    print(f"extracting the regions of {images}, into {out}", file=sys.stderr, flush=True)
    if subprocess.run(line, stdout=sys.stderr, check=False).returncode:
        raise OperationError(f"{flag} {images}: oscar-extract failed, see above")

    return out
