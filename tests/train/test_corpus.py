"""Texts and tags as integers say the same as the strings in the shards."""

import dataclasses
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from small_shards import write_folder

from oscar_common.errors import UsageError
from oscar_common.sample import Sample, Text
from oscar_shards.read import open_folder
from oscar_train.corpus import CAPTION, MAX_TEXT, QA, Corpus, load_corpus
from oscar_train.ragged import Ragged, concatenated, ragged
from oscar_train.tokens import Tokenizer


def test_every_text_is_a_triple_with_its_own_tokens(corpus: Corpus, samples: list[Sample], tokenizer: Tokenizer):
    texts = [(row, sample, text) for row, sample in enumerate(samples) for text in sample.texts]
    assert len(corpus) == len(texts) == 39 * 3 + 10
    assert corpus.textless == 1

    def ids(words: str) -> list[int]:
        return tokenizer.backend(words, add_special_tokens=False)["input_ids"][:MAX_TEXT]

    for triple, (row, sample, text) in enumerate(texts):
        q = text.answer if text.kind == "qa" else " ".join(sample.regions.tags)
        assert corpus.image[triple] == row
        assert corpus.kind[triple] == (QA if text.kind == "qa" else CAPTION)
        assert corpus.first[triple].tolist() == ids(text.question if text.kind == "qa" else text.text)
        assert corpus.second[corpus.second_row[triple]].tolist() == ids(q)


def test_negatives_come_from_triples_of_one_kind_whose_q_is_not_empty(corpus: Corpus):
    for kind, pool in enumerate(corpus.pools):
        assert set(corpus.kind[pool]) == {kind}
        assert (corpus.second.lengths[corpus.second_row[pool]] > 0).all()
    assert len(corpus.pools[CAPTION]) == 38 * 3  # images 3 (no text) and 4 (no regions) give none
    assert len(corpus.pools[QA]) == 10


def rewritten(folder: Path, samples: list[Sample], number: int, **changes: object) -> Path:
    changed = [dataclasses.replace(s, **changes) if i == number else s for i, s in enumerate(samples)]
    return write_folder(folder, changed)


def test_the_fingerprint_knows_content_and_not_the_place(
    corpus: Corpus, samples: list[Sample], tokenizer: Tokenizer, tmp_path: Path
):
    def fingerprint(folder: Path) -> str:
        return load_corpus(open_folder(folder), tokenizer).fingerprint

    assert fingerprint(write_folder(tmp_path / "moved", samples)) == corpus.fingerprint
    other_text = [Text(kind="caption", source="c", id="0", text="something else")]
    assert fingerprint(rewritten(tmp_path / "text", samples, 8, texts=other_text)) != corpus.fingerprint
    regions = samples[8].regions
    other_regions = dataclasses.replace(regions, features=regions.features + np.float16(1))
    assert fingerprint(rewritten(tmp_path / "features", samples, 8, regions=other_regions)) != corpus.fingerprint


def test_texts_of_which_no_token_is_left_are_no_triples(samples: list[Sample], tokenizer: Tokenizer, tmp_path: Path):
    blank = [
        Text(kind="caption", source="c", id="0", text=" \u200b "),
        Text(kind="qa", source="q", id="1", question="who?"),
    ]
    corpus = load_corpus(open_folder(rewritten(tmp_path / "s", samples[:4], 0, texts=blank)), tokenizer)
    assert set(corpus.image) == {1, 2}
    assert corpus.textless == 2


def test_shards_without_any_text_are_refused(samples: list[Sample], tokenizer: Tokenizer, tmp_path: Path):
    folder = open_folder(write_folder(tmp_path / "s", [dataclasses.replace(s, texts=[]) for s in samples[:3]]))
    with pytest.raises(UsageError, match="none of its 3 images has a text; extract with --captions"):
        load_corpus(folder, tokenizer)


def test_an_unknown_kind_of_text_is_refused_by_name(samples: list[Sample], tokenizer: Tokenizer, tmp_path: Path):
    odd = [Text(kind="poem", source="c", id="0", text="o cat")]
    folder = open_folder(rewritten(tmp_path / "s", samples[:4], 1, texts=odd))
    with pytest.raises(UsageError, match="image-001 has a text of kind 'poem'"):
        load_corpus(folder, tokenizer)


def test_ragged_rows_behave_like_lists(rng: np.random.Generator):
    rows = [rng.integers(1, 99, n).tolist() for n in rng.integers(0, 7, 30)]
    table = ragged(rows)
    picked = rng.integers(0, 30, 50)
    padded, lengths = table.padded(picked, 4)

    def lists(given: Ragged) -> list[list[int]]:
        return [given[i].tolist() for i in range(len(given))]

    assert lists(table) == rows
    assert lists(table.take(picked)) == [rows[i] for i in picked]
    assert lists(table.cut(3)) == [r[:3] for r in rows]
    assert lists(table.joined(np.array([0, 0, 10, 30]))) == [[], [*chain(*rows[:10])], [*chain(*rows[10:])]]
    assert lists(concatenated([table, ragged([]), table])) == rows + rows
    assert padded.tolist() == [(rows[i] + [0] * 4)[:4] for i in picked]
    assert lengths.tolist() == [min(len(rows[i]), 4) for i in picked]
