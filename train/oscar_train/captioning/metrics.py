"""How close captions are to the references of their images: BLEU-4, CIDEr-D and ROUGE-L.

On the same words the numbers are those of COCO's evaluation (pycocoevalcap 1.2) to 1e-6, its rounding of what does not
occur included. They are shares, like its own; publications give a hundred times as much.

A caption and a reference are lists of words (`oscar_train.captioning.words.split_words`). Each image has one caption
and at least one reference.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from oscar_train.captioning.words import split_words

Words = Sequence[str]
NGram = tuple[str, ...]

LONGEST = 4  # words of an n-gram
SMALL, TINY = 1e-9, 1e-15  # what COCO's BLEU adds to counts, so that it never divides by 0
SIGMA = 6.0  # of CIDEr-D's penalty on length, in words
RECALL_WEIGHT = 1.2  # ROUGE-L's beta


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many images' references each n-gram occurs, of so many images."""

    counts: Counter[NGram]
    images: int


@dataclass(frozen=True)
class _Weights:
    """The TF-IDF weights of a sentence's n-grams, their norm for each n, and the number of words."""

    of_ngram: dict[NGram, float]
    norms: list[float]
    length: int


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Score captions as they are written, one an image, against the references of each image.

    Returns:
        bleu_4, cider_d and rouge_l of all images together. CIDEr-D takes its document frequencies from these
        references, so that it is 0 for a single image.
    """
    words = [split_words(caption) for caption in captions]
    reference_words = [[split_words(text) for text in texts] for texts in references]

    cider = cider_d(words, reference_words, document_frequencies(reference_words))
    rouge = [rouge_l(*pair) for pair in zip(words, reference_words, strict=True)]

    return {
        "bleu_4": bleu(words, reference_words)[LONGEST - 1],
        "cider_d": sum(cider) / len(cider),
        "rouge_l": sum(rouge) / len(rouge),
    }


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Return BLEU-1 to BLEU-4 of a corpus (Papineni et al. 2002).

    The length that a caption should have is that of its closest reference, the shorter of two.
    """
    matches, totals = [0] * LONGEST, [0] * LONGEST
    length = reference_length = 0
    for caption, own_references in zip(captions, references, strict=True):
        most = _most_common(own_references)
        for ngram, count in ngrams(caption).items():
            matches[len(ngram) - 1] += min(count, most[ngram])
            totals[len(ngram) - 1] += count

        length += len(caption)
        lengths = (len(reference) for reference in own_references)
        reference_length += min(lengths, key=lambda other: (abs(other - len(caption)), other))

    ratio = (length + TINY) / (reference_length + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []

    for n, (right, total) in enumerate(zip(matches, totals, strict=True), 1):
        product *= (right + TINY) / (total + SMALL)
        scores.append(brevity * product ** (1 / n))

    return scores


def cider_d(
    captions: Sequence[Words], references: Sequence[Sequence[Words]], frequencies: DocumentFrequencies
) -> list[float]:
    """Return CIDEr-D of each image (Vedantam et al. 2015, section 4); that of a corpus is the mean.

    Args:
        frequencies: of the n-grams, from the references of all images; COCO's evaluation takes those scored.
    """
    return [
        _consensus(_weights(caption, frequencies), [_weights(reference, frequencies) for reference in own_references])
        for caption, own_references in zip(captions, references, strict=True)
    ]


def rouge_l(caption: Words, references: Sequence[Words]) -> float:
    """Return ROUGE-L of an image (Lin 2004): an F-measure of the longest common subsequence.

    Precision and recall are each the best of any reference.
    """
    common = [_common_length(caption, reference) for reference in references]
    if not any(common):
        return 0.0

    precision = max(common) / len(caption)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True) if reference)
    weight = RECALL_WEIGHT**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


def document_frequencies(references: Sequence[Sequence[Words]]) -> DocumentFrequencies:
    """Count for each n-gram the images that have it in any reference."""
    counts: Counter[NGram] = Counter()
    for own_references in references:
        counts.update(set().union(*map(ngrams, own_references)))
    return DocumentFrequencies(counts, len(references))


def ngrams(words: Words) -> Counter[NGram]:
    """Count the n-grams of one to four words."""
    return Counter(tuple(words[begin : begin + n]) for n, begin in _places(len(words)))


def _places(length: int) -> Iterator[tuple[int, int]]:
    """Yield the size and the first word of each n-gram."""
    for n in range(1, LONGEST + 1):
        for begin in range(length - n + 1):
            yield n, begin


def _most_common(references: Sequence[Words]) -> Counter[NGram]:
    """Return how often each n-gram occurs in that reference that has it most often."""
    most: Counter[NGram] = Counter()
    for reference in references:
        most |= ngrams(reference)
    return most


def _weights(words: Words, frequencies: DocumentFrequencies) -> _Weights:
    """Return the TF-IDF weights of a sentence; an n-gram that no reference has counts as if one had it."""
    of_ngram: dict[NGram, float] = {}
    squares = [0.0] * LONGEST
    for ngram, count in ngrams(words).items():
        weight = count * math.log(frequencies.images / max(1, frequencies.counts[ngram]))
        of_ngram[ngram] = weight
        squares[len(ngram) - 1] += weight**2

    return _Weights(of_ngram, [math.sqrt(square) for square in squares], len(words))


def _consensus(caption: _Weights, references: Sequence[_Weights]) -> float:
    """Return ten times the mean similarity over n and the references (equations 4 and 5)."""
    return 10 * sum(_similarity(caption, reference) for reference in references) / len(references) / LONGEST


def _similarity(caption: _Weights, reference: _Weights) -> float:
    """Return the sum over n of the clipped cosines, less for another length."""
    products = [0.0] * LONGEST
    for ngram, weight in caption.of_ngram.items():
        other = reference.of_ngram.get(ngram, 0.0)
        products[len(ngram) - 1] += min(weight, other) * other

    norms = zip(products, caption.norms, reference.norms, strict=True)
    cosines = sum(product / (own * other) for product, own, other in norms if own and other)
    difference = max(caption.length - 1, 0) - max(reference.length - 1, 0)  # in bigrams, as COCO's code counts
    return cosines * math.exp(-(difference**2) / (2 * SIGMA**2))


def _common_length(first: Words, second: Words) -> int:
    """Return how many words the longest common subsequence has."""
    row = [0] * (len(second) + 1)
    for word in first:
        above = 0  # of the column before
        for column, other in enumerate(second, 1):
            above, row[column] = row[column], above + 1 if word == other else max(row[column], row[column - 1])
    return row[-1]
