"""Search: the photos that fit a text best, and the texts that fit a photo best.

First all photos are compared with the text by words alone: each word of the text with the tag of the photo that is
nearest to it, by the cosine of the model's own word embeddings (1 for the same word). Then the model looks at the best
few hundred. What it did not look at is counted, and can be looked at, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oscar_common.errors import UsageError
from oscar_train.batch import Batch
from oscar_train.data.texts.ragged import Ints, Ragged
from oscar_train.predict.model import TaskModel
from oscar_train.predict.photos import Photos, make_batch
from oscar_train.tasks.retrieval import match_score

CANDIDATES = 200
CHUNK = 64  # rows that the model sees at once
FUNCTION_WORDS = frozenset(
    """a an and are as at be by for from has have he her his in into is it its next of off on one onto or out over she
    some that the their them there they this to two under up while who with""".split()  # noqa: SIM905  # prose
)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Match:
    """A photo or a text and how well it fits. photo: its number. probability: that the two belong together."""

    photo: int
    path: str
    text: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found, the best first.

    scored: how many pairs the model looked at. total: how many there are.
    """

    matches: list[Match]
    scored: int
    total: int


def score(model: TaskModel, photos: Photos, photo: str, text: str) -> float:
    """Return the probability that a photo (its key, path or file name) and a text belong together.

    Raises:
        UsageError: there is no such photo.
    """
    number = photos.find(photo)
    if number is None:
        raise UsageError(f"no photo {photo!r} in these shards; give its key, path or file name")
    return float(probabilities(model, photos, np.array([number]), _tokens(model, [text]))[0])


def search(
    model: TaskModel, photos: Photos, text: str, *, limit: int = 12, candidates: int | None = CANDIDATES
) -> SearchResult:
    """Return the photos that fit a text best.

    Args:
        model: fine-tuned for retrieval.
        photos: among which.
        text: a caption, or words.
        limit: how many are returned at most.
        candidates: how many the model looks at; None: all.

    Raises:
        UsageError: there is no text, or no photo.
    """
    words = _tokens(model, [text])
    if not words.lengths[0]:
        raise UsageError(f"{text!r}: no word; give a text to search for")
    if not len(photos):
        raise UsageError("--shards: no photos")

    chosen = np.arange(len(photos))
    if candidates is not None and candidates < len(photos):
        chosen = np.sort(np.argsort(-likeness(model, photos.tags, words[0]), kind="stable")[:candidates])

    probability = probabilities(model, photos, chosen, words)
    best = np.argsort(-probability, kind="stable")[:limit]
    paths = photos.table["path"].take(chosen[best]).to_pylist()
    matches = [
        Match(photo=int(chosen[n]), path=str(path), text=text, probability=float(probability[n]))
        for n, path in zip(best, paths, strict=True)
    ]

    return SearchResult(matches=matches, scored=len(chosen), total=len(photos))


def search_texts(
    model: TaskModel,
    photos: Photos,
    photo: int,
    texts: Sequence[str],
    *,
    limit: int = 12,
    candidates: int | None = CANDIDATES,
) -> SearchResult:
    """Return the texts that fit a photo best; see `search`. Equal texts count once.

    Raises:
        UsageError: there is no text.
    """
    distinct = list(dict.fromkeys(text for text in texts if text.strip()))
    tokens = _tokens(model, distinct)
    if not distinct:
        raise UsageError("--shards: no texts to choose from; give shards whose images have captions")

    chosen = np.arange(len(distinct))
    if candidates is not None and candidates < len(distinct):
        chosen = np.sort(np.argsort(-likeness(model, tokens, photos.tags[photo]), kind="stable")[:candidates])

    probability = probabilities(model, photos, np.full(len(chosen), photo), tokens.take(chosen))
    best = np.argsort(-probability, kind="stable")[:limit]
    path = str(photos.row(photo)[1]["path"])
    matches = [
        Match(photo=photo, path=path, text=distinct[int(chosen[n])], probability=float(probability[n])) for n in best
    ]

    return SearchResult(matches=matches, scored=len(chosen), total=len(distinct))


def probabilities(model: TaskModel, photos: Photos, which: Ints, texts: Ragged) -> Floats:
    """Return the probability that photos and texts belong together, float32 [n].

    Args:
        which: int64 [n], photos. texts: n rows of tokens, or one for all.
    """
    parts = []
    for begin in range(0, len(which), CHUNK):
        rows = np.arange(begin, min(begin + CHUNK, len(which)))
        text = texts.take(rows) if len(texts) == len(which) else texts
        parts.append(matching(model, make_batch(model, photos, which[rows], text)))
    return torch.cat(parts).numpy()


def matching(model: TaskModel, batch: Batch) -> Tensor:
    """Return the probability that the two sides of each row belong together, float32 [B]."""
    return torch.sigmoid(match_score(model.scores(batch)))


def likeness(model: TaskModel, rows: Ragged, words: npt.NDArray[np.int32]) -> Floats:
    """Return how alike rows of tokens are to some words, float32 [rows], by words alone.

    It is the sum over the words of the largest cosine with a token of the row, none below 0; function words do not
    count unless there are no others.
    """
    query_tokens = np.array([word for word in set(words.tolist()) if not _is_function_word(model, word)], np.int64)
    query_tokens = np.unique(words).astype(np.int64) if not len(query_tokens) else query_tokens
    if not len(rows.values) or not len(query_tokens):
        return np.zeros(len(rows), np.float32)

    row_tokens, place = np.unique(rows.values, return_inverse=True)
    embedding = model.network.bert.embeddings.word_embeddings.weight.detach().float().cpu()
    embedding = embedding - embedding.mean(0)  # all of BERT's point to one side
    unit = torch.nn.functional.normalize(embedding, dim=1)
    cosine = (unit[torch.from_numpy(query_tokens)] @ unit[torch.from_numpy(row_tokens)].T).clamp(min=0).numpy()

    has_tokens = rows.lengths > 0
    starts = rows.offsets[:-1][has_tokens]
    total = np.zeros(len(rows), np.float32)

    for line in cosine:
        total[has_tokens] += np.maximum.reduceat(line[place], starts)

    return total


def contributions(model: TaskModel, photos: Photos, match: Match) -> tuple[Floats, dict[str, float]]:
    """Return what carried a match: how much its score falls without each region, float32 [R], and without each tag.

    The falls are of the log odds, relative to the largest; one that does not fall is 0.
    """
    text = _tokens(model, [match.text])
    batch = make_batch(model, photos, np.array([match.photo]), text)
    count = int(batch.region_mask[0].sum())
    tags = _tag_places(model, batch)

    lines = _repeated(batch, 1 + count + len(tags))

    for region in range(count):
        lines.region_mask[1 + region, region] = False

    for number, places in enumerate(tags.values(), 1 + count):
        lines.attention_mask[number, places] = False

    scores = [match_score(model.scores(lines.part(n, min(n + CHUNK, len(lines.triples))))) for n in _chunks(lines)]
    falls = torch.cat(scores)
    falls = (falls[0] - falls[1:]).clamp(min=0)
    falls = falls / falls.max().clamp(min=1e-6)
    of_tags = dict(zip(tags, falls[count:].tolist(), strict=True))

    return falls[:count].numpy(), of_tags


def _chunks(batch: Batch) -> range:
    return range(0, len(batch.triples), CHUNK)


def _repeated(batch: Batch, count: int) -> Batch:
    """Return the one row of a batch so many times."""
    rows = torch.zeros(count, dtype=torch.int64)
    return replace(batch, **{name: tensor.index_select(0, rows) for name, tensor in vars(batch).items()})


def _tag_places(model: TaskModel, batch: Batch) -> dict[str, Tensor]:
    """Return where each different word of the tags stands in the row."""
    ids, types = batch.input_ids[0], batch.token_type_ids[0]
    inside = (types == 1) & (ids != model.tokenizer.sep) & batch.attention_mask[0]
    names = model.tokenizer.backend.convert_ids_to_tokens(ids.tolist())
    places: dict[str, list[int]] = {}
    word = ""

    for place in inside.nonzero()[:, 0].tolist():
        word = word if names[place].startswith("##") else names[place]
        places.setdefault(word, []).append(place)

    return {word: torch.tensor(numbers) for word, numbers in places.items()}


def _tokens(model: TaskModel, texts: Sequence[str]) -> Ragged:
    return model.tokenizer(texts, model.shape.tokens - 2)


def _is_function_word(model: TaskModel, token: int) -> bool:
    name: str = model.tokenizer.backend.convert_ids_to_tokens(token)
    return name in FUNCTION_WORDS or not any(letter.isalnum() for letter in name)
