"""What a model is asked about held-out images: which triples, with which masks and which wrong texts.

All of it follows from the shards, the classes of the contrastive head and a seed: not from the run, its own seed, its
variant or its negatives. So the numbers of two models compare. Masks are the paper's (15 % of each text, at least one
token), what replaces a text is of its own kind.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from oscar_common.errors import UsageError
from oscar_train.arguments import SHUFFLES
from oscar_train.batch import IGNORED
from oscar_train.data.batch_buffer import BatchBuffer, put_regions, put_text
from oscar_train.data.corpus import Corpus
from oscar_train.data.reading.regions import RegionReader
from oscar_train.data.sampling.negatives import Pools, make_pools
from oscar_train.data.sampling.philox import EVALUATION, permutation
from oscar_train.data.sampling.text_pairs import Sides
from oscar_train.data.sampling.triples import TextBatch, assemble, laid_out
from oscar_train.data.texts.phrases import CAPTION
from oscar_train.data.texts.ragged import Ints
from oscar_train.objectives import MATCHED, WRONG_Q, WRONG_W, Objective

FEATURES, TAGS, CAPTIONS = SHUFFLES
SEED = 0


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """Questions about the images of a corpus.

    asked: for each class of the objective that there is, what makes every triple one of that class.
    triples: int64 [n], those asked about, sorted. partners: int64 [n], for each of them one of its kind that is of
    another image, whose regions, tags or caption stand in for its own where these are shuffled.
    gallery, gallery_partners: int64 [N], the same of the triples whose images and texts are to find each other.
    """

    corpus: Corpus
    reader: RegionReader
    objective: Objective
    asked: dict[str, Objective]
    pools: Pools
    triples: Ints
    partners: Ints
    gallery: Ints
    gallery_partners: Ints
    seed: int

    def regions(self, triples: Ints, partners: Ints, buffer: BatchBuffer, shuffled: str | None = None) -> None:
        """Read the regions of some triples, or of their partners, into a room."""
        images = self.corpus.image[partners if shuffled == FEATURES else triples]
        self.reader.read(images, buffer.slots)
        put_regions(self.reader, images, buffer)
        buffer.batch.triples.numpy()[:] = triples

    def text(self, name: str, begin: int, buffer: BatchBuffer, shuffled: str | None = None) -> None:
        """Put the texts of the triples from `begin` on, made to be of class `name`, into a room.

        Rows that could not be made so (no wrong text was found, or there is no q to replace) have no label.
        """
        rows = slice(begin, begin + len(buffer))
        change = partial(_change, self.corpus, self.triples[rows], self.partners[rows], shuffled)
        text = assemble(
            self.corpus, self.pools, self.asked[name], self.triples[rows], self.seed, 0, begin, change=change
        )
        text.match_labels[text.match_labels != self.objective.label(name)] = IGNORED
        put_text(text, buffer, self.corpus.tokenizer)

    def pairs(self, text: int, begin: int, buffer: BatchBuffer, shuffled: str | None = None) -> None:
        """Put a text of the gallery, beside the tags of each image from `begin` on, into a room; nothing is masked.

        An answer belongs to its question, and tags to their image (Oscar section 3.1, modality view).
        """
        rows = slice(begin, begin + len(buffer))
        w = np.full(len(buffer), (self.gallery_partners if shuffled == CAPTIONS else self.gallery)[text])
        tags = (self.gallery_partners if shuffled == TAGS else self.gallery)[rows]
        q = np.where(self.corpus.kind[w] == CAPTION, tags, w)
        sides = Sides(w=w, q=q, lent=np.zeros(len(w), bool))
        ids, types, inside, _ = laid_out(self.corpus, sides)
        nothing = np.full(ids.shape, IGNORED)
        unknown = np.full(len(w), IGNORED)
        put_text(
            TextBatch(
                input_ids=ids,
                token_type_ids=types,
                attention_mask=inside,
                mlm_labels=nothing,
                match_labels=unknown,
                dropout_seeds=np.zeros(len(w), np.int64),
            ),
            buffer,
            self.corpus.tokenizer,
        )


def _change(corpus: Corpus, triples: Ints, partners: Ints, shuffled: str | None, sides: Sides) -> Sides:
    """Put the tags, or the caption, of partners where a triple has still its own."""
    captions = corpus.kind[triples] == CAPTION
    if shuffled == TAGS:
        return replace(sides, q=np.where(captions & (sides.q == triples) & ~sides.lent, partners, sides.q))
    if shuffled == CAPTIONS:
        return replace(sides, w=np.where(captions & (sides.w == triples), partners, sides.w))
    return sides


def make_question_set(
    corpus: Corpus,
    reader: RegionReader,
    objective: Objective,
    only: npt.NDArray[np.integer[Any]] | None,
    *,
    triples: int,
    images: int,
    seed: int = SEED,
) -> QuestionSet:
    """Draw what is asked about.

    Args:
        objective: of which the classes count, and what is replaced.
        only: the triples that there are, sorted; None: all of the corpus.
        triples: how many are asked about at most; 0: all.
        images: how many are in the gallery at most.

    Raises:
        UsageError: there are fewer than two images, so that nothing can be wrong.
    """
    some = np.arange(len(corpus)) if only is None else only.astype(np.int64)
    if len(some) == 0 or (corpus.image[some] == corpus.image[some[0]]).all():
        raise UsageError("the evaluation needs at least two held-out images with texts; give more")

    objective = replace(objective, negatives="typed", exact=True, any_token=False, whole_words=False)
    chosen = _drawn(seed, some, triples or len(some), lane=0)
    gallery = _drawn(seed, _one_each(corpus, some), images, lane=1)
    return QuestionSet(
        corpus=corpus,
        reader=reader,
        objective=objective,
        asked=_asked(objective),
        pools=make_pools(corpus, [Fraction(1)] * len(corpus.sources), objective, only),
        triples=chosen,
        partners=_partners(corpus, chosen),
        gallery=gallery,
        gallery_partners=_partners(corpus, gallery),
        seed=seed,
    )


def _asked(objective: Objective) -> dict[str, Objective]:
    """Return for each class what makes every triple one of it."""
    matched = replace(objective, wrong_w=0.0, wrong_q=0.0)
    wrong = {WRONG_W: replace(matched, wrong_w=1.0), WRONG_Q: replace(matched, wrong_q=1.0)}
    exists = {WRONG_W: objective.wrong_w > 0, WRONG_Q: objective.wrong_q > 0}
    return {MATCHED: matched} | {name: made for name, made in wrong.items() if exists[name]}


def _drawn(seed: int, triples: Ints, count: int, lane: int) -> Ints:
    """Draw some of the triples, sorted."""
    return np.sort(triples[permutation(seed, EVALUATION, 0, len(triples), (lane, 0))[:count]])


def _one_each(corpus: Corpus, triples: Ints) -> Ints:
    """Return the first caption of each image; of questions, if there is no caption at all."""
    captions = triples[corpus.kind[triples] == CAPTION]
    candidates = captions if len(captions) else triples
    return candidates[np.unique(corpus.image[candidates], return_index=True)[1]]


def _partners(corpus: Corpus, triples: Ints) -> Ints:
    """Return for each triple the one of its kind that stands half of them further on: of another image, if there is."""
    partners = triples.copy()
    for kind in np.unique(corpus.kind[triples]):
        (rows,) = np.nonzero(corpus.kind[triples] == kind)
        partners[rows] = triples[np.roll(rows, len(rows) // 2)]
    return partners
