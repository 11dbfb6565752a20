"""The plan: which image goes into which shard, with which texts. Everything after it is a function of the plan."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from oscar_common.errors import UsageError, reason
from oscar_common.files import replacing
from oscar_common.progress import phase
from oscar_common.sample import KEY_BYTES, Text, make_key
from oscar_common.settings import Extract
from oscar_common.tables import TEXTS, Ints, array
from oscar_extract.sources.corpus import Corpus, Request, find_files, read_corpus
from oscar_extract.sources.inventory import Listing, take_inventory
from oscar_extract.sources.remote import Cache, RemoteTars, Root, cache_of
from oscar_extract.sources.tables import LEFT_OUT
from oscar_shards.manifest import LEFT_OUT_FILE, PLAN_FILE, PlanRecord
from oscar_shards.remote import Stamp
from oscar_shards.seal import write_sealed

TEXT = pa.struct([field for field in TEXTS if field.name != "image"])
PLAN = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("id", pa.string()),
        ("path", pa.string()),
        ("also", pa.list_(pa.string())),  # other files with the same bytes
        ("texts", pa.list_(TEXT)),
        # Where the image's bytes are; see oscar_extract.sources.tables.FILES
        ("root", pa.int32()),
        ("raw", pa.binary()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)
CONTENT = ("key", "source", "id", "path", "also", "texts")  # what decides the shards, wherever the files lie
UNREADABLE = (OSError, ValueError, LookupError, TypeError, pa.ArrowException)  # what a damaged plan raises
GROUP = 1000  # rows that are read together, at least


@dataclass(frozen=True, kw_only=True)
class PlannedImage:
    """An image to extract. `path` is how people know it; `root`, `raw`, `offset` and `size` say where its bytes are."""

    key: str
    source: str
    id: str
    path: str
    also: list[str]
    texts: list[Text]
    root: int
    raw: bytes | None = None
    offset: int | None = None
    size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Count:
    """A row of the corpus table: images and texts of a dataset, and what was left out of it, by reason."""

    dataset: str
    images: int
    texts: int
    left_out: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All images of a job in order (a table of the schema PLAN). Shard i holds those from i * images_per_shard on."""

    roots: list[Root]
    table: pa.Table
    counts: list[Count]
    left_out: pa.Table
    record: PlanRecord
    inputs: str  # what it was made from, as a hash


def plan_of(request: Request, settings: Extract) -> Plan:
    """Return the plan of a job: the one that lies in --out if it was made from the same, else a new one.

    Raises:
        UsageError: see `read_corpus`.
    """
    with phase("listing files"):
        input_files = find_files(request)

    choices = settings.images_per_shard, settings.limit, settings.shuffle_seed
    inputs = inputs_digest(request, input_files, *choices)
    if settings.out and not settings.overwrite and (plan := saved_plan(Path(settings.out), inputs, cache_of(settings))):
        return plan

    with phase("looking into tars"):
        inventory = take_inventory(input_files)

    with phase("reading and joining datasets"):
        return make_plan(read_corpus(request, inventory), request, inputs, *choices)


def make_plan(
    corpus: Corpus, request: Request, inputs: str, images_per_shard: int, limit: int | None, shuffle_seed: int | None
) -> Plan:
    """Fix the order of a corpus: that of its datasets, or one shuffled by a seed; and cut it off at `limit`."""
    order = np.arange(len(corpus.image))
    if shuffle_seed is not None:
        order = np.random.Generator(np.random.Philox(shuffle_seed)).permutation(len(order))

    table = _table(corpus, request, order[:limit])
    left_out = corpus.left_out
    absent = _value_counts(left_out["reason"])
    # What a list names and a tar has lost is in both of these.
    missing = absent.get("dead-link", 0) + max(absent.get("missing", 0), corpus.lost)
    record = PlanRecord(
        images=", ".join(str(p.remote or p.root) for p in request.parts),
        captions=", ".join(p.captions for p in request.parts if p.captions) or None,
        num_images=len(table),
        num_texts=len(array(table["texts"]).flatten()),
        num_duplicates=len(array(table["also"]).flatten()),
        num_missing=missing if len(table) == len(corpus.image) else 0,  # with a limit, others are taken instead
        images_per_shard=images_per_shard,
        num_shards=-(-len(table) // images_per_shard),
        sha256=_digest([array(table[name]) for name in CONTENT]),
    )

    return Plan(
        roots=corpus.roots, table=table, counts=_counts(corpus), left_out=left_out, record=record, inputs=inputs
    )


def _table(corpus: Corpus, request: Request, order: Ints) -> pa.Table:
    image = corpus.image.take(pa.array(order))
    source = pc.replace_substring_regex(image, r"(?s)/.*$", "")
    ids = pc.replace_substring_regex(image, r"^[^/]*/", "")
    alone = len(request.parts) == 1 and not request.parts[0].layout and not request.parts[0].is_listing
    starts = np.searchsorted(corpus.text_row, np.arange(len(corpus.image) + 1)).astype(np.int32)
    structs = pa.StructArray.from_arrays([array(corpus.texts[f.name]) for f in TEXT], fields=list(TEXT))
    files = corpus.files.take(pa.array(order))

    return pa.table(
        [
            make_keys(ids if alone else image),
            source,
            ids,
            array(files["path"]),
            corpus.also.take(pa.array(order)),
            pa.ListArray.from_arrays(starts, structs).take(pa.array(order)),
            *(array(files[name]) for name in ("root", "raw", "offset", "size")),
        ],
        schema=PLAN,
    )


def make_keys(ids: pa.Array) -> pa.Array:
    """Return `make_key` of each id; the many that have nothing strange in them but slashes and dots, without a loop."""
    keys = pc.replace_substring(pc.replace_substring(ids, "/", "%2F"), ".", "%2E")
    easy = pc.and_(
        pc.match_substring_regex(ids, r"^[A-Za-z0-9_/.-]*$"), pc.less_equal(pc.binary_length(keys), KEY_BYTES)
    )
    hard = np.flatnonzero(~easy.to_numpy(zero_copy_only=False))
    made = pa.array([make_key(i) for i in ids.take(pa.array(hard)).to_pylist()], pa.string())

    return pc.replace_with_mask(keys, pc.invert(easy), made)


def _counts(corpus: Corpus) -> list[Count]:
    """Count images (those it lists or has texts of) and texts of each dataset, in the order in which they appear."""
    of_text = pa.table({"dataset": array(corpus.texts["source"]), "row": pa.array(corpus.text_row)})
    images = pa.concat_tables([corpus.mentions, of_text]).group_by(["dataset", "row"], use_threads=False).aggregate([])
    left_out = corpus.left_out
    names = pc.unique(pa.concat_tables([images.select(["dataset"]), left_out.select(["dataset"])])["dataset"])
    count_images, count_texts = _value_counts(images["dataset"]), _value_counts(of_text["dataset"])

    return [
        Count(
            dataset=name,
            images=count_images.get(name, 0),
            texts=count_texts.get(name, 0),
            left_out=_value_counts(left_out.filter(pc.equal(left_out["dataset"], name))["reason"]),
        )
        for name in names.to_pylist()
    ]


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {row["values"]: row["counts"] for row in pc.value_counts(column).to_pylist()}


def inputs_digest(request: Request, listing: Listing, *settings: object) -> str:
    """Return a hash of all that a plan is made from: the request, the files found, sizes and times of what is read.

    Of tars that is all; to look for their members again would take minutes.
    """
    captions = [Path(p.captions) for p in request.parts if p.captions]
    read = [
        *listing.annotations,
        *(tar for _, tar, _ in listing.tars if isinstance(tar, Path)),
        *request.exclude,
        *captions,
    ]
    read += [p.root for p in request.parts if p.is_listing]
    read += [path for folder in captions if folder.is_dir() for path in sorted(folder.rglob("*.txt"))]
    stats = [(str(p), s.st_size, s.st_mtime_ns) for p in read if p.exists() for s in [p.stat()]]
    request_text = repr(dataclasses.replace(request, out=None, splits=frozenset()))  # the order of a set is not fixed
    content = json.dumps([request_text, sorted(request.splits), settings, stats])

    return _digest([array(listing.files[n]) for n in ("root", "path")], content)


def _digest(columns: list[pa.Array], first: str = "") -> str:
    """Return the SHA-256 of what columns hold, however Arrow has laid it out."""
    digest = hashlib.sha256(first.encode())
    for column in columns:
        _update(digest, column)
    return digest.hexdigest()


def _update(digest: Any, column: pa.Array) -> None:
    digest.update(np.packbits(column.is_valid().to_numpy(zero_copy_only=False)))
    if pa.types.is_struct(column.type):
        for field in column.flatten():
            _update(digest, field)
    elif pa.types.is_list(column.type):
        digest.update(pc.list_value_length(column).fill_null(0).to_numpy())
        _update(digest, column.flatten())
    elif pa.types.is_string(column.type) or pa.types.is_binary(column.type):
        digest.update(pc.binary_length(column).fill_null(0).to_numpy())
        whole = column.fill_null(b"" if pa.types.is_binary(column.type) else "")
        _, starts, data = whole.buffers()
        if data is not None:
            ends = np.frombuffer(starts, np.int32)[[whole.offset, whole.offset + len(whole)]]
            digest.update(memoryview(data)[ends[0] : ends[1]])
    else:
        digest.update(column.fill_null(0).to_numpy())


def write_plan(out: Path, plan: Plan) -> None:
    """Write the plan, and the list of what was left out, beside the shards."""
    metadata = {
        "roots": [_described(root) for root in plan.roots],
        "counts": [dataclasses.asdict(count) for count in plan.counts],
        "record": dataclasses.asdict(plan.record),
        "inputs": plan.inputs,
    }
    size = plan.record.images_per_shard
    with replacing(out / PLAN_FILE) as file:
        table = plan.table.replace_schema_metadata({"oscar.plan": json.dumps(metadata)})
        write_sealed(table, file, compression="zstd", row_group_size=size * -(-GROUP // size))

    if len(plan.left_out):
        with replacing(out / LEFT_OUT_FILE) as file:
            write_sealed(plan.left_out, file, compression="zstd")
    else:
        (out / LEFT_OUT_FILE).unlink(missing_ok=True)


def _described(root: Root) -> Any:
    return {"url": root.url, "files": root.files} if isinstance(root, RemoteTars) else str(root.absolute())


def _roots(values: dict[str, Any], cache: Cache) -> list[Root]:
    return [
        RemoteTars(root["url"], {name: Stamp(*stamp) for name, stamp in root["files"].items()}, cache)
        if isinstance(root, dict)
        else Path(root)
        for root in values["roots"]
    ]


def saved_plan(out: Path, inputs: str, cache: Cache) -> Plan | None:
    """Return the plan that lies in `out` if it was made from the same, without the table, which workers read."""
    try:
        plan = _read_plan(out, cache)
    except UNREADABLE:
        return None  # none yet, or damaged: it is made again
    return plan if plan.inputs == inputs else None


def joined_plan(out: Path, cache: Cache) -> Plan:
    """Return the plan that lies in `out`, whatever it was made from, without the table, which workers read.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    try:
        return _read_plan(out, cache)
    except UNREADABLE as error:
        raise _no_plan(out, error) from None


def _read_plan(out: Path, cache: Cache) -> Plan:
    metadata = _said(out)
    return Plan(
        roots=_roots(metadata, cache),
        table=PLAN.empty_table(),
        counts=[Count(**c) for c in metadata["counts"]],
        left_out=LEFT_OUT.empty_table(),
        record=PlanRecord(**metadata["record"]),
        inputs=metadata["inputs"],
    )


def _no_plan(out: Path, error: Exception) -> UsageError:
    return UsageError(
        f"{out / PLAN_FILE}: cannot be read ({reason(error)}); the command that began the job makes it again"
    )


def _said(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(pq.read_schema(out / PLAN_FILE).metadata[b"oscar.plan"])
    return content


def planned_record(out: Path) -> PlanRecord:
    """Return the record of the plan that lies in `out`.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    try:
        return PlanRecord(**_said(out)["record"])
    except UNREADABLE as error:
        raise _no_plan(out, error) from None


def read_shard_plan(out: Path, number: int, cache: Cache) -> tuple[list[Root], list[PlannedImage]]:
    """Return the roots and the images of one shard, from the plan that lies in `out`; nothing else of it is read."""
    metadata = _said(out)
    size = PlanRecord(**metadata["record"]).images_per_shard
    with pq.ParquetFile(out / PLAN_FILE) as file:
        rows = file.metadata.row_group(0).num_rows
        table = file.read_row_group(number * size // rows)
    return _roots(metadata, cache), planned_images(table.slice(number * size % rows, size))


def planned_images(table: pa.Table) -> list[PlannedImage]:
    """Return rows of the schema PLAN as objects."""
    return [PlannedImage(**{**row, "texts": [Text(**text) for text in row["texts"]]}) for row in table.to_pylist()]
