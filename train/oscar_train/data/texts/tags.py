"""Which tags of an image are q, and in which order: the knobs of the paper's ablation (Oscar section 5.3)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from xxhash import xxh3_64_intdigest

from oscar_common.errors import UsageError
from oscar_common.settings import Train
from oscar_common.text_files import read_text, split_lines
from oscar_train.data.texts.hashes import Words, spread, sums
from oscar_train.data.texts.ragged import Ints, Ragged, concatenated
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.objectives import choose_tags

FLAG = "--tag-vocabulary"

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class TagRule:
    """What becomes of the tags of an image, in this order.

    which: the detected ones; or those of the ground truth where an image has any; or none, of any image.
    vocabulary: tags not in it are left out.
    min_score: tags that the detector scored lower are left out; tags without a score stay, as the ground truth's do.
    order: of `oscar_common.settings.TAG_ORDERS`. By score (highest first), tags without scores, as the ground truth's
        are, stay as they are; random is the same order in every epoch, run and machine.
    dedupe: of tags that are equal, the first stays.
    budget: as many stay, the first.

    Two tags are equal if the model sees the same tokens ("Cat" and "cat"); one without any token is none.
    """

    which: str = "detected"
    budget: int | None = None
    dedupe: bool = False
    order: str = "detector"
    vocabulary: tuple[str, ...] | None = None
    min_score: float | None = None


DETECTED = TagRule()


def tag_rule(settings: Train) -> TagRule:
    """Return the rule that the settings say.

    Raises:
        UsageError: the file of the vocabulary is missing, in an encoding that is not read, or empty.
    """
    return TagRule(
        which=choose_tags(settings),
        budget=settings.tag_budget,
        dedupe=settings.tag_dedupe,
        order=settings.tag_order,
        vocabulary=None if settings.tag_vocabulary is None else _read_vocabulary(Path(settings.tag_vocabulary)),
        min_score=settings.min_tag_score,
    )


def _read_vocabulary(path: Path) -> tuple[str, ...]:
    try:
        lines = split_lines(read_text(path, FLAG))
    except OSError as error:
        raise UsageError(f"{FLAG} {path}: cannot be read ({error.strerror}); give a file of one tag a line") from None

    if not (names := tuple(name for line in lines if (name := line.strip()))):
        raise UsageError(f"{FLAG} {path}: it has no tag; give one a line, or no {FLAG}")

    return names


@dataclass(frozen=True)
class _Places:
    """Tags of some images, each where it stands: its image, its place there, its number among the different ones."""

    image: Ints
    place: Ints
    code: Ints

    def take(self, which: Bools | Ints) -> "_Places":
        return _Places(self.image[which], self.place[which], self.code[which])


class Tagging:
    """Makes the tag sequences of images; remembers the few different tags, so that each is tokenised once.

    ground_truth: how many images had tags of the ground truth used, so far.
    """

    def __init__(self, tokenizer: Tokenizer, rule: TagRule, width: int) -> None:
        self.rule, self.ground_truth = rule, 0
        self._tokenizer, self._width = tokenizer, width
        self._met = self._kept = 0  # tags, before and after the vocabulary
        self._names = pa.array([], pa.string())
        self._tokens = tokenizer([], width)
        self._hashes = np.zeros(0, np.uint64)
        self._first = np.zeros(0, np.int64)  # the first tag that is equal
        self._vocabulary = _hashes(tokenizer(rule.vocabulary or (), width))

    def __call__(self, rows: pa.RecordBatch) -> tuple[Ragged, Words]:
        """Return the tag sequence of each image, its tags joined by spaces; and what stands for the set of them.

        `rows` are those of an index: of its columns those named key, tags, gt_tags and scores count.
        """
        from_truth = self._from_truth(rows)
        self.ground_truth += int(from_truth.sum())
        tags = self._known(self._placed(self._chosen(rows, from_truth)))
        if self.rule.min_score is not None:
            # a missing score is NaN, which is not below anything
            is_weak = _scores(rows, from_truth, tags) < self.rule.min_score
            tags = tags.take(~is_weak)

        if self.rule.order != "detector":
            by = _random(rows, tags) if self.rule.order == "random" else -_scores(rows, from_truth, tags)
            tags = tags.take(np.lexsort((by, tags.image)))  # stable

        if self.rule.dedupe:
            tags = tags.take(np.sort(np.unique(tags.image << 32 | tags.code, return_index=True)[1]))

        groups = np.searchsorted(tags.image, np.arange(len(rows) + 1))
        if self.rule.budget is not None:
            tags = tags.take(np.arange(len(tags.image)) - groups[tags.image] < self.rule.budget)
            groups = np.searchsorted(tags.image, np.arange(len(rows) + 1))

        # WordPiece splits at spaces first, so the ids of the tags are those of the whole
        strung = self._tokens.take(tags.code).joined(groups).cut(self._width)
        return strung, sums(tags.image, tags.code, self._hashes, len(rows))

    def check(self) -> None:
        """Check that the vocabulary had any of the tags so far.

        Raises:
            UsageError: it had none.
        """
        if self._met and not self._kept and self.rule.vocabulary:
            raise UsageError(
                f"{FLAG}: none of the {self._met:,} tags of the images is in it (they are like "
                f"{self._names[0].as_py()!r}); give tags of these shards, one a line, or --tags none"
            )

    def _from_truth(self, rows: pa.RecordBatch) -> Bools:
        if self.rule.which != "ground-truth":
            return np.zeros(len(rows), bool)
        return _lengths(rows.column("gt_tags")) > 0

    def _chosen(self, rows: pa.RecordBatch, from_truth: Bools) -> pa.ListArray:
        if self.rule.which == "none":
            return pa.nulls(len(rows), pa.list_(pa.string()))
        if not from_truth.any():
            return rows.column("tags")
        return pc.if_else(pa.array(from_truth), rows.column("gt_tags"), rows.column("tags"))

    def _placed(self, lists: pa.ListArray) -> _Places:
        names = lists.flatten().fill_null("")
        self._learn(pc.unique(names))
        code = pc.index_in(names, value_set=self._names).to_numpy(zero_copy_only=False).astype(np.int64)
        lengths = _lengths(lists)
        image = np.repeat(np.arange(len(lists)), lengths)
        return _Places(image, np.arange(len(image)) - (np.cumsum(lengths) - lengths)[image], self._first[code])

    def _known(self, tags: _Places) -> _Places:
        """Leave out what is no tag, or not in the vocabulary."""
        tags = tags.take(self._tokens.lengths[tags.code] > 0)
        self._met += len(tags.code)
        if self.rule.vocabulary is not None:
            tags = tags.take(np.isin(self._hashes, self._vocabulary)[tags.code])
        self._kept += len(tags.code)
        return tags

    def _learn(self, names: pa.Array) -> None:
        new = names.filter(pc.invert(pc.is_in(names, value_set=self._names)))
        if not len(new):
            return

        tokens = self._tokenizer(new.to_pylist(), self._width)
        self._names = pa.concat_arrays([self._names, new])
        self._tokens = concatenated([self._tokens, tokens])
        self._hashes = np.concatenate([self._hashes, _hashes(tokens)])
        _, first, equal = np.unique(self._hashes, return_index=True, return_inverse=True)
        self._first = first[equal]


def _hashes(tokens: Ragged) -> Words:
    """Return what stands for each tag as the model sees it: of its tokens, not of its letters."""
    return np.array([xxh3_64_intdigest(tokens[row].tobytes()) for row in range(len(tokens))], np.uint64)


def _lengths(lists: pa.ListArray) -> Ints:
    lengths: Ints = pc.list_value_length(lists).fill_null(0).to_numpy().astype(np.int64)
    return lengths


def _random(rows: pa.RecordBatch, tags: _Places) -> Words:
    """Return a number for each tag, as random as can be, that its image's key and its place there decide."""
    keys = np.array([xxh3_64_intdigest(key.encode()) for key in rows.column("key").to_pylist()], np.uint64)
    return spread(keys[tags.image] ^ spread(tags.place.astype(np.uint64)))


def _scores(rows: pa.RecordBatch, from_truth: Bools, tags: _Places) -> npt.NDArray[np.float32]:
    """Return the score of each tag, float32 [T]: NaN where it has none, and for all tags of an image without scores."""
    scores = rows.column("scores")
    lengths = _lengths(scores)
    scored = (lengths == _lengths(rows.column("tags"))) & ~from_truth
    begin = np.cumsum(lengths) - lengths
    values = scores.flatten().to_numpy(zero_copy_only=False).astype(np.float32)  # null becomes NaN

    score = np.full(len(tags.image), np.nan, np.float32)
    has_score = scored[tags.image]
    score[has_score] = values[(begin[tags.image] + tags.place)[has_score]]

    return score
