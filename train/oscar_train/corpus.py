"""All texts and tags of a folder of shards as arrays of token ids: a step slices integers and meets no string."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from oscar_common.errors import UsageError
from oscar_shards.read import ShardFolder
from oscar_train.ragged import Ints, Ragged, concatenated
from oscar_train.tokens import Tokenizer

KINDS = ("caption", "qa")
CAPTION, QA = 0, 1  # their numbers
MAX_TEXT = 32  # tokens of w and q together: 35 less [CLS] and two [SEP]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """T triples (w, q, v) of N images. An image with n texts is in n triples.

    first: T rows, the tokens of w: a caption, or a question.
    second: N + T rows, what q is taken from: the tag sequence of each image, then the answer of each triple (empty for
        captions). second_row: int64 [T], the row of each triple's q.
    image: int64 [T], row of the shards' table. kind: int8 [T], CAPTION or QA.
    pools: per kind, the triples that q may be taken from for another triple: those whose q is not empty.
    textless: images that have no text, and so are in no triple.
    fingerprint: changes with anything that a training run could see of the shards or the tokenizer.
    """

    first: Ragged
    second: Ragged
    second_row: Ints
    image: Ints
    kind: npt.NDArray[np.int8]
    pools: tuple[Ints, Ints]
    textless: int
    fingerprint: str
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return len(self.image)


def load_corpus(folder: ShardFolder, tokenizer: Tokenizer) -> Corpus:
    """Tokenise the texts and tags of all shards.

    Raises:
        UsageError: no image has a text, or the index holds what the shard contract does not allow.
    """
    columns = folder.table.select(["key", "tags", "texts"])
    texts = [_shard_texts(batch, tokenizer) for batch in columns.to_batches()]
    start = np.cumsum([0, *(batch.num_rows for batch in columns.to_batches())])
    image = np.concatenate([np.zeros(0, np.int64), *(t.image + s for t, s in zip(texts, start, strict=False))])
    if not len(image):
        raise UsageError(
            f"--shards {folder.folder}: none of its {folder.table.num_rows} images has a text; extract with "
            "--captions, or add some with --texts"
        )
    first = concatenated(t.first for t in texts)
    second = concatenated([_tags(folder.table.column("tags"), tokenizer), *(t.second for t in texts)])
    kind = np.concatenate([t.kind for t in texts])
    second_row = np.where(kind == QA, folder.table.num_rows + np.arange(len(image)), image)
    usable = second.lengths[second_row] > 0
    return Corpus(
        first=first,
        second=second,
        second_row=second_row,
        image=image,
        kind=kind,
        pools=(np.flatnonzero(usable & (kind == CAPTION)), np.flatnonzero(usable & (kind == QA))),
        textless=folder.table.num_rows - len(np.unique(image)),
        fingerprint=_fingerprint(first, second, image, folder.table),
        tokenizer=tokenizer,
    )


@dataclass(frozen=True)
class _Texts:
    """The texts of one shard; `image` counts from its first."""

    image: Ints
    kind: npt.NDArray[np.int8]
    first: Ragged
    second: Ragged


def _shard_texts(batch: pa.RecordBatch, tokenizer: Tokenizer) -> _Texts:
    """Tokenise (w, answer) of each text; texts of which nothing is left are dropped."""
    image = pc.list_parent_indices(batch.column("texts")).to_numpy().astype(np.int64)
    kind, text, question, answer = (
        pc.struct_field(batch.column("texts").flatten(), name) for name in ("kind", "text", "question", "answer")
    )
    if len(odd := np.flatnonzero(~pc.is_in(kind, value_set=pa.array(KINDS)).to_numpy(zero_copy_only=False))):
        key, found = batch.column("key")[int(image[odd[0]])], kind[int(odd[0])].as_py()
        raise UsageError(f"--shards: image {key} has a text of kind {found!r}; known: {', '.join(KINDS)}")
    is_qa = pc.equal(kind, KINDS[QA])
    first = tokenizer(pc.if_else(is_qa, question, text).fill_null("").to_pylist(), MAX_TEXT)
    second = tokenizer(pc.if_else(is_qa, answer, "").fill_null("").to_pylist(), MAX_TEXT)
    qa = is_qa.to_numpy(zero_copy_only=False).astype(np.int8)
    keep = np.flatnonzero((first.lengths > 0) & ((second.lengths > 0) | (qa == CAPTION)))
    return _Texts(image[keep], qa[keep], first.take(keep), second.take(keep))


def _tags(column: pa.ChunkedArray, tokenizer: Tokenizer) -> Ragged:
    """Return the tag sequence of each image, N rows: tags in their order, repeated ones too, joined by spaces.

    WordPiece splits at spaces first, so each of the few class names is tokenised once and the ids are strung together.
    """
    names = pc.unique(pc.list_flatten(column))
    known = tokenizer(names.fill_null("").to_pylist(), MAX_TEXT)
    return concatenated(_strung(chunk, names, known) for chunk in column.chunks)


def _strung(tags: pa.ListArray, names: pa.Array, known: Ragged) -> Ragged:
    codes = pc.index_in(tags.flatten(), value_set=names).to_numpy(zero_copy_only=False).astype(np.int64)
    counts = pc.list_value_length(tags).fill_null(0).to_numpy().astype(np.int64)
    return known.take(codes).joined(np.concatenate([[0], np.cumsum(counts)])).cut(MAX_TEXT)


def _fingerprint(first: Ragged, second: Ragged, image: Ints, table: pa.Table) -> str:
    digest = xxhash.xxh3_64()
    names = ["width", "height", "boxes_xxh3", "features_xxh3"]
    if table.column("scales_xxh3").null_count < len(table):  # features as int8
        names.append("scales_xxh3")
    regions = (table.column(name).fill_null(0).to_numpy() for name in names)
    for array in (first.values, first.offsets, second.values, second.offsets, image, *regions):
        digest.update(np.ascontiguousarray(array).data)
    return str(digest.hexdigest())
