"""How many WordPiece tokens texts and tags have: what of a triple still fits where training cuts it."""

from collections import Counter
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from oscar_common.wordpiece import wordpiece

LIMIT = 32  # tokens of w and q that training takes: 35 less [CLS] and two [SEP]
SAMPLE = 200_000  # texts that are split at most
CHUNK = 10_000  # texts split at once
LONGEST = 20_000  # characters of a text that are split; nothing after them changes whether it fits
Ints = npt.NDArray[np.int64]


class Lengths:
    """Token lengths of texts, tag sequences and triples, of shards that are added one after the other.

    Of the texts every `stride`-th is split. It doubles, and every other one is dropped, whenever there are more than
    `sample`: so they lie evenly over all shards, however many there turn out to be.

    tags: images by the tokens of all their tags. words, triples: int64, for each text in the sample the tokens of w
    (caption or question), and those of w and q (the image's tags, or the answer) together.
    """

    def __init__(self, sample: int = SAMPLE) -> None:
        self.sample, self.stride, self.seen = sample, 1, 0
        self.tags: Counter[int] = Counter()
        self.words = self.triples = np.zeros(0, np.int64)
        self._known: dict[str, int] = {}

    @cached_property
    def _tokenizer(self) -> Any:
        return wordpiece()

    def add(self, table: pa.Table) -> None:
        """Add the images of a shard, given its index."""
        of_tags = self._of_tags(table["tags"].combine_chunks())
        self.tags += Counter(dict(zip(*(a.tolist() for a in np.unique(of_tags, return_counts=True)), strict=True)))
        column = table["texts"].combine_chunks()
        texts, image = column.flatten(), pc.list_parent_indices(column).to_numpy().astype(np.int64)
        sampled = np.arange(-self.seen % self.stride, len(texts), self.stride)
        self.seen += len(texts)
        words, answers, is_qa = self._of_texts(texts.take(pa.array(sampled)))
        self.words = np.concatenate([self.words, words])
        self.triples = np.concatenate([self.triples, words + np.where(is_qa, answers, of_tags[image[sampled]])])

        while len(self.words) > self.sample:
            self.words, self.triples, self.stride = self.words[::2], self.triples[::2], 2 * self.stride

    def _of_texts(self, texts: pa.StructArray) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
        kind, text, question, answer = (pc.struct_field(texts, n) for n in ("kind", "text", "question", "answer"))
        is_qa = pc.fill_null(pc.equal(kind, "qa"), False)
        words = self._split(pc.if_else(is_qa, question, text))
        return words, self._split(pc.if_else(is_qa, answer, "")), is_qa.to_numpy(zero_copy_only=False)

    def _split(self, texts: pa.Array) -> Ints:
        """Return the number of tokens of each text."""
        plain = pc.utf8_slice_codeunits(pc.fill_null(texts, ""), 0, LONGEST)
        lengths = np.zeros(len(plain), np.int64)
        filled = np.flatnonzero(pc.not_equal(plain, "").to_numpy(zero_copy_only=False))

        for begin in range(0, len(filled), CHUNK):
            part = filled[begin : begin + CHUNK]
            chunk = plain.take(pa.array(part)).to_pylist()
            lengths[part] = [len(e) for e in self._tokenizer.encode_batch(chunk, add_special_tokens=False)]

        return lengths

    def _of_tags(self, column: pa.ListArray) -> Ints:
        """Return the tokens of each image's tags, joined by spaces, where WordPiece splits first: a sum over tags."""
        coded = pc.fill_null(column.flatten(), "").dictionary_encode()
        names = coded.dictionary.to_pylist()
        if new := [name for name in names if name not in self._known]:
            self._known |= dict(zip(new, self._split(pa.array(new, pa.string())).tolist(), strict=True))

        of_name = np.array([self._known[name] for name in names], np.int64)
        sums = np.concatenate([[0], np.cumsum(of_name[coded.indices.to_numpy()])]).astype(np.int64)
        ends = np.cumsum(pc.fill_null(pc.list_value_length(column), 0).to_numpy())
        return np.asarray(np.diff(sums[ends], prepend=0), np.int64)
