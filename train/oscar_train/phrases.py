"""The texts and tags of some images as token ids."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from oscar_common.errors import UsageError
from oscar_shards.values import KINDS
from oscar_train.ragged import Ints, Ragged, concatenated
from oscar_train.sources import FLAG
from oscar_train.tokens import Tokenizer

CAPTION, QA = 0, 1  # their places in KINDS
MAX_TEXT = 32  # tokens of w and q together: 35 less [CLS] and two [SEP]

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class Phrases:
    """The t triples of n images.

    first: t rows, w. second: n rows of tags, then the answers. image, second_row: int64 [t], counting from the first of
    these images and rows. second_set: uint64 [rows of second]. kind: int8 [t], CAPTION or QA.
    """

    first: Ragged
    second: Ragged
    second_row: Ints
    second_set: Words
    image: Ints
    kind: npt.NDArray[np.int8]


class Phrasing:
    """Tokenises; remembers the few different tags, so that each is tokenised once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names = pa.array([], pa.string())
        self._tokens = tokenizer([], MAX_TEXT)
        self._hashes = np.zeros(0, np.uint64)

    def __call__(self, keys: pa.Array, tags: pa.ListArray, texts: pa.ListArray) -> Phrases:
        """Tokenise the (w, answer) of each text, and the tags of each image.

        Texts of which nothing is left are dropped.

        Raises:
            UsageError: a text is of an unknown kind.
        """
        image = pc.list_parent_indices(texts).to_numpy().astype(np.int64)
        kind, text, question, answer = (
            pc.struct_field(texts.flatten(), name) for name in ("kind", "text", "question", "answer")
        )
        if len(odd := np.flatnonzero(~pc.is_in(kind, value_set=pa.array(KINDS)).to_numpy(zero_copy_only=False))):
            key, found = keys[int(image[odd[0]])], kind[int(odd[0])].as_py()
            raise UsageError(f"{FLAG}: image {key} has a text of kind {found!r}; known: {', '.join(KINDS)}")
        is_qa = pc.equal(kind, KINDS[QA])
        first = self._tokenizer(pc.if_else(is_qa, question, text).fill_null("").to_pylist(), MAX_TEXT)
        answers = self._tokenizer(pc.if_else(is_qa, answer, "").fill_null("").to_pylist(), MAX_TEXT)
        qa = is_qa.to_numpy(zero_copy_only=False)
        keep = np.flatnonzero((first.lengths > 0) & ((answers.lengths > 0) | ~qa))
        image, qa, answers = image[keep], qa[keep], answers.take(keep[qa[keep]])
        strung, sets = self._strung(tags)
        return Phrases(
            first=first.take(keep),
            second=concatenated([strung, answers]),
            second_row=np.where(qa, len(tags) + np.cumsum(qa) - 1, image),
            second_set=np.concatenate([sets, set_of(answers)]),
            image=image,
            kind=np.where(qa, QA, CAPTION).astype(np.int8),
        )

    def _strung(self, tags: pa.ListArray) -> tuple[Ragged, Words]:
        """Return the tag sequence of each image, tags in their order, repeated ones too, joined by spaces; and what
        stands for the set of them.

        WordPiece splits at spaces first, so the ids of the tags are those of the whole.
        """
        names = tags.flatten().fill_null("")
        self._learn(pc.unique(names))
        codes = pc.index_in(names, value_set=self._names).to_numpy(zero_copy_only=False).astype(np.int64)
        counts = pc.list_value_length(tags).fill_null(0).to_numpy().astype(np.int64)
        groups = np.concatenate([[0], np.cumsum(counts)])
        sets = _sums(np.repeat(np.arange(len(tags)), counts), codes, self._hashes, len(tags))
        return self._tokens.take(codes).joined(groups).cut(MAX_TEXT), sets

    def _learn(self, names: pa.Array) -> None:
        new = names.filter(pc.invert(pc.is_in(names, value_set=self._names)))
        if not len(new):
            return
        tokens = self._tokenizer(new.to_pylist(), MAX_TEXT)
        self._names = pa.concat_arrays([self._names, new])
        self._tokens = concatenated([self._tokens, tokens])
        # Of the tokens, not of the letters: "Cat" and "cat" are one tag to the model
        hashes = [xxhash.xxh3_64_intdigest(tokens[row].tobytes()) for row in range(len(tokens))]
        self._hashes = np.concatenate([self._hashes, np.array(hashes, np.uint64)])


def set_of(rows: Ragged) -> Words:
    """Return for each row a number that stands for the set of its values, uint64 [rows]."""
    return _sums(np.repeat(np.arange(len(rows)), rows.lengths), rows.values, None, len(rows))


def _sums(row: Ints, code: npt.NDArray[np.integer], hashes: Words | None, rows: int) -> Words:
    """Sum the hashes of the different codes of each row; `hashes` by code, else the codes are hashed here."""
    pairs = np.sort(row << 32 | code.astype(np.int64))
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # as np.unique, which takes three times as long
    codes = pairs & 0xFFFFFFFF
    sums = np.zeros(rows, np.uint64)
    np.add.at(sums, pairs >> 32, spread(codes.astype(np.uint64)) if hashes is None else hashes[codes])
    return sums


def spread(values: Words) -> Words:
    """Return other numbers for numbers, as random as can be (the finalizer of splitmix64)."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
