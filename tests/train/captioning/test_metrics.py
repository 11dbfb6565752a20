"""BLEU-4, CIDEr-D and ROUGE-L against their papers' formulas, and against COCO's evaluation where it is installed."""

import math
import random
from itertools import combinations

import pytest

from oscar_train.captioning.metrics import (
    bleu,
    caption_scores,
    cider_d,
    document_frequencies,
    rouge_l,
)

Words = list[str]


def corpus(images: int = 12, seed: int = 5) -> tuple[list[Words], list[list[Words]]]:
    """Captions and references of few different words, some captions odd: empty, of one word, one word often."""
    draw = random.Random(seed)
    vocabulary = ["a", "a", "a", "dog", "cat", "on", "the", "the", "red", "mat", "runs", "with", "ball"]

    def sentence(least: int = 1) -> Words:
        return draw.choices(vocabulary, k=draw.randint(least, 9))

    references = [[sentence() for _ in range(draw.randint(1, 4))] for _ in range(images)]
    captions = [draw.choice(own)[:] if draw.random() < 0.4 else sentence() for own in references]
    captions[0], captions[1], captions[2] = [], ["dog"], ["the"] * 7
    return captions, references


def runs(words: Words, n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def paper_bleu_4(captions: list[Words], references: list[list[Words]]) -> float:
    """Papineni et al. 2002: modified precisions, their geometric mean, the brevity penalty."""
    logs = 0.0
    for n in (1, 2, 3, 4):
        clipped = total = 0
        for caption, own in zip(captions, references, strict=True):
            total += len(runs(caption, n))
            for run in set(runs(caption, n)):
                clipped += min(runs(caption, n).count(run), max(runs(reference, n).count(run) for reference in own))
        logs += math.log(clipped / total) / 4
    c = sum(map(len, captions))
    r = sum(
        sorted((abs(len(ref) - len(cap)), len(ref)) for ref in own)[0][1]
        for cap, own in zip(captions, references, strict=True)
    )
    return min(1.0, math.exp(1 - r / c)) * math.exp(logs)


def paper_cider_d(captions: list[Words], references: list[list[Words]]) -> list[float]:
    """Vedantam et al. 2015: CIDEr-D with sigma 6 and the factor 10; lengths in bigrams, as COCO's code has them."""

    def weight(run: tuple[str, ...], words: Words) -> float:
        images = sum(any(run in runs(ref, len(run)) for ref in own) for own in references)
        return runs(words, len(run)).count(run) * math.log(len(references) / max(1, images))

    def norm(words: Words, n: int) -> float:
        return math.sqrt(sum(weight(run, words) ** 2 for run in set(runs(words, n))))

    def similarity(caption: Words, reference: Words, n: int) -> float:
        product = sum(
            min(weight(run, caption), weight(run, reference)) * weight(run, reference) for run in set(runs(caption, n))
        )
        length = norm(caption, n) * norm(reference, n)
        difference = len(runs(caption, 2)) - len(runs(reference, 2))
        return 10 * math.exp(-(difference**2) / 72) * (product / length if length else 0.0)

    return [
        sum(similarity(caption, reference, n) for n in (1, 2, 3, 4) for reference in own) / 4 / len(own)
        for caption, own in zip(captions, references, strict=True)
    ]


def paper_rouge_l(caption: Words, references: list[Words]) -> float:
    """Lin 2004; the longest common subsequence by trying all of the caption's."""

    def is_part(part: tuple[str, ...], words: Words) -> bool:
        rest = iter(words)
        return all(word in rest for word in part)

    def longest(reference: Words) -> int:
        sizes = range(len(caption), -1, -1)
        return next(n for n in sizes if any(is_part(part, reference) for part in combinations(caption, n)))

    if not caption or not any(map(longest, references)):
        return 0.0
    precision = max(longest(reference) / len(caption) for reference in references)
    recall = max(longest(reference) / len(reference) for reference in references)
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def test_bleu_is_the_papers():
    captions, references = corpus()
    assert bleu(captions, references)[3] == pytest.approx(paper_bleu_4(captions, references), abs=1e-6)


def test_cider_d_is_the_papers():
    captions, references = corpus()
    scores = cider_d(captions, references, document_frequencies(references))
    assert max(scores) > 1
    assert scores == pytest.approx(paper_cider_d(captions, references), abs=1e-9)


def test_rouge_l_is_the_papers():
    captions, references = corpus()
    scores = [rouge_l(caption, own) for caption, own in zip(captions, references, strict=True)]
    assert scores == pytest.approx(
        [paper_rouge_l(caption, own) for caption, own in zip(captions, references, strict=True)], abs=1e-9
    )


def test_all_three_are_those_of_cocos_evaluation():
    """In numbers that are odd, too: no n-gram in common, a single image, an empty caption."""
    pytest.importorskip("pycocoevalcap", reason="pip install 'oscar-pretrain[captions]' to compare with COCO's code")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    captions, references = corpus(images=40)
    for size in (40, 3, 1):
        some, own = captions[:size], references[:size]
        theirs = {i: [" ".join(words)] for i, words in enumerate(some)}
        truth = {i: [" ".join(words) for words in texts] for i, texts in enumerate(own)}
        assert bleu(some, own) == pytest.approx(Bleu().compute_score(truth, theirs, verbose=0)[0], abs=1e-6)
        scores = cider_d(some, own, document_frequencies(own))
        assert scores == pytest.approx(Cider().compute_score(truth, theirs)[1].tolist(), abs=1e-6)
        rouge = [rouge_l(words, texts) for words, texts in zip(some, own, strict=True)]
        assert rouge == pytest.approx(Rouge().compute_score(truth, theirs)[1].tolist(), abs=1e-6)


def test_written_captions_are_scored_by_their_words():
    scores = caption_scores(["A dog's ball.", "a cat"], [["a dog 's ball", "the ball"], ["A cat!"]])
    assert scores["bleu_4"] == pytest.approx(1, abs=1e-3)
    assert scores["rouge_l"] == 1
    assert scores["cider_d"] > 2
