"""The texts and tags of some images as token ids."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from oscar_common.errors import UsageError
from oscar_shards.values import KINDS
from oscar_train.batch import MAX_TEXT
from oscar_train.data.sources import FLAG
from oscar_train.data.texts.hashes import Words, set_of
from oscar_train.data.texts.ragged import Ints, Ragged, concatenated
from oscar_train.data.texts.tags import Tagging, TagRule
from oscar_train.data.texts.tokens import Tokenizer

CAPTION, QA = 0, 1  # their places in KINDS


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
    """Tokenises texts, and the tags that a rule leaves. width: tokens of w and q together that a row has room for."""

    def __init__(self, tokenizer: Tokenizer, rule: TagRule, width: int = MAX_TEXT) -> None:
        self.tagging = Tagging(tokenizer, rule, width)
        self._tokenizer, self._width = tokenizer, width

    def __call__(self, rows: pa.RecordBatch, texts: pa.ListArray) -> Phrases:
        """Tokenise the (w, answer) of each text, and the tags of each image; `rows` are those of an index.

        Texts of which nothing is left are dropped.

        Raises:
            UsageError: a text is of an unknown kind.
        """
        image = pc.list_parent_indices(texts).to_numpy().astype(np.int64)
        kind, text, question, answer = (
            pc.struct_field(texts.flatten(), name) for name in ("kind", "text", "question", "answer")
        )
        if len(odd := np.flatnonzero(~pc.is_in(kind, value_set=pa.array(KINDS)).to_numpy(zero_copy_only=False))):
            key, odd_kind = rows.column("key")[int(image[odd[0]])], kind[int(odd[0])].as_py()
            raise UsageError(f"{FLAG}: image {key} has a text of kind {odd_kind!r}; known: {', '.join(KINDS)}")

        is_qa = pc.equal(kind, KINDS[QA])
        first = self._tokenizer(pc.if_else(is_qa, question, text).fill_null("").to_pylist(), self._width + 1)
        answers = self._tokenizer(pc.if_else(is_qa, answer, "").fill_null("").to_pylist(), self._width)
        qa = is_qa.to_numpy(zero_copy_only=False)
        keep = np.flatnonzero((first.lengths > 0) & ((answers.lengths > 0) | ~qa))
        image, qa, answers = image[keep], qa[keep], answers.take(keep[qa[keep]])
        strung, sets = self.tagging(rows)

        return Phrases(
            first=first.take(keep),
            second=concatenated([strung, answers]),
            second_row=np.where(qa, len(rows) + np.cumsum(qa) - 1, image),
            second_set=np.concatenate([sets, set_of(answers)]),
            image=image,
            kind=np.where(qa, QA, CAPTION).astype(np.int8),
        )
