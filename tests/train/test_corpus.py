"""Texts and tags as integers say the same as the strings in the shards; they are made once, and mapped after that."""

import dataclasses
import errno
import fcntl
import os
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import warm
from small_shards import make_samples, write_folder
from support import until

from oscar_common.errors import UsageError
from oscar_common.sample import Sample, Text
from oscar_train.batch import MAX_TEXT, MAX_W
from oscar_train.data import corpus as corpora
from oscar_train.data.corpus import META, Corpus, open_corpus
from oscar_train.data.sources import open_source
from oscar_train.data.texts.hashes import set_of
from oscar_train.data.texts.phrases import CAPTION, QA
from oscar_train.data.texts.ragged import Ragged, concatenated, ragged
from oscar_train.data.texts.tokens import Tokenizer


def load(folder: Path, tokenizer: Tokenizer, cache: Path, skip_corrupt: bool = False) -> Corpus:
    return open_corpus([open_source(str(folder), skip_corrupt)], tokenizer, cache, skip_corrupt=skip_corrupt)


def test_every_text_is_a_triple_with_its_own_tokens(corpus: Corpus, samples: list[Sample], tokenizer: Tokenizer):
    texts = [(row, sample, text) for row, sample in enumerate(samples) for text in sample.texts]
    assert len(corpus) == len(texts) == 39 * 3 + 10
    assert corpus.textless == 1

    def ids(words: str, limit: int) -> list[int]:
        return tokenizer.backend(words, add_special_tokens=False)["input_ids"][:limit]

    for triple, (row, sample, text) in enumerate(texts):
        q = text.answer if text.kind == "qa" else " ".join(sample.regions.tags)
        assert corpus.image[triple] == row
        assert corpus.key(row) == sample.key
        assert corpus.kind[triple] == (QA if text.kind == "qa" else CAPTION)
        assert corpus.first[triple].tolist() == ids(text.question if text.kind == "qa" else text.text, MAX_W)
        assert corpus.second[corpus.second_row[triple]].tolist() == ids(q, MAX_TEXT)


def test_the_sets_of_two_images_are_equal_if_their_tags_are(corpus: Corpus, samples: list[Sample]):
    tagged = [t for t in range(len(corpus)) if corpus.kind[t] == CAPTION]
    tags = {int(corpus.second_row[t]): frozenset(samples[corpus.image[t]].regions.tags) for t in tagged}
    for row, one in tags.items():
        for other_row, other in tags.items():
            assert (one == other) == (corpus.second_set[row] == corpus.second_set[other_row])
    assert len(set(tags.values())) > 10
    answers = ragged([[5, 7], [7, 5, 5], [7], [], [5], [12]])
    sets = set_of(answers).tolist()
    assert sets[0] == sets[1]
    assert len(set(sets)) == 5


def test_negatives_come_from_triples_of_one_kind_whose_q_is_not_empty(corpus: Corpus):
    for kind, pool in enumerate(corpus.pools):
        assert set(corpus.kind[pool]) == {kind}
        assert (corpus.second.lengths[corpus.second_row[pool]] > 0).all()
    assert len(corpus.pools[CAPTION]) == 38 * 3  # images 3 (no text) and 4 (no regions) give none
    assert len(corpus.pools[QA]) == 10


def test_shards_and_sources_know_their_images_and_triples(corpus: Corpus, samples: list[Sample]):
    assert corpus.shard_images.tolist() == [0, 9, 18, 27, 36, 40]
    counts = [len(sample.texts) for sample in samples]
    assert corpus.shard_triples.tolist() == [sum(counts[:n]) for n in (0, 9, 18, 27, 36, 40)]
    assert corpus.source_shards.tolist() == [0, 5]
    assert corpus.images.shard.tolist() == [n // 9 for n in range(40)]
    assert corpus.shard_name(4).endswith("/shards/shard-000004.tar")


def rewritten(folder: Path, samples: list[Sample], number: int, **changes: object) -> Path:
    changed = [dataclasses.replace(s, **changes) if i == number else s for i, s in enumerate(samples)]
    return write_folder(folder, changed)


def test_the_fingerprint_knows_content_and_not_the_place(
    corpus: Corpus, samples: list[Sample], tokenizer: Tokenizer, tmp_path: Path
):
    def fingerprint(folder: Path) -> str:
        return load(folder, tokenizer, tmp_path / "cache").fingerprint

    assert fingerprint(write_folder(tmp_path / "moved", samples)) == corpus.fingerprint
    other_text = [Text(kind="caption", source="c", id="0", text="something else")]
    assert fingerprint(rewritten(tmp_path / "text", samples, 8, texts=other_text)) != corpus.fingerprint
    regions = samples[8].regions
    other_regions = dataclasses.replace(regions, features=regions.features + np.float16(1))
    assert fingerprint(rewritten(tmp_path / "features", samples, 8, regions=other_regions)) != corpus.fingerprint


def test_it_is_made_once_for_the_same_texts_and_again_for_others(
    shards: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache = tmp_path / "cache"
    first = load(shards, tokenizer, cache)
    (made,) = (cache / "corpus").iterdir()
    before = made.stat().st_mtime_ns

    def forbidden(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("oscar_train.data.corpus.collect", forbidden)
    again = load(shards, tokenizer, cache)
    assert again.fingerprint == first.fingerprint
    assert made.stat().st_mtime_ns == before
    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)  # copy2 keeps times, as mv does
    assert load(moved, tokenizer, cache).fingerprint == first.fingerprint
    other = dataclasses.replace(tokenizer, mask=tokenizer.mask + 1)
    with pytest.raises(AssertionError, match="made again"):
        load(shards, other, cache)
    os.utime(moved / "shard-000001.parquet")
    with pytest.raises(AssertionError, match="made again"):
        load(moved, tokenizer, cache)


def test_it_is_mapped_and_not_copied(shards: Path, tokenizer: Tokenizer, tmp_path: Path):
    corpus = load(shards, tokenizer, tmp_path)
    for array in (corpus.first.values, corpus.second.offsets, corpus.image, corpus.images.features_xxh3):
        assert not array.flags.writeable
        assert not array.flags.owndata
    assert corpus.first.values.dtype == np.uint16  # 30,522 words


def test_a_damaged_cache_is_made_again(
    shards: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first = load(shards, tokenizer, tmp_path)
    tokens = first.first.values.tolist()
    (made,) = (tmp_path / "corpus").iterdir()
    values = made / "first_values.npy"
    content = bytearray(values.read_bytes())
    content[-9] ^= 4
    values.write_bytes(content)
    assert load(shards, tokenizer, tmp_path).fingerprint == first.fingerprint
    assert "first_values.npy is damaged; it is made again" in capsys.readouterr().err
    (made / META).write_text("{")
    assert load(shards, tokenizer, tmp_path).fingerprint == first.fingerprint
    assert "corpus.json is damaged; it is made again" in capsys.readouterr().err
    assert load(shards, tokenizer, tmp_path).first.values.tolist() == tokens
    assert capsys.readouterr().err == ""


MAKE = """
import sys
from pathlib import Path
from oscar_train.data.corpus import open_corpus
from oscar_train.data.sources import open_source
from oscar_train.data.texts.tokens import load_tokenizer
print(open_corpus([open_source(sys.argv[1], False)], load_tokenizer(None), Path(sys.argv[2])).fingerprint)
"""


def make(shards: Path, cache: Path) -> warm.Process:
    return warm.Process("-c", MAKE, shards, cache)


def test_processes_that_begin_together_make_it_once_and_a_killed_one_leaves_nothing(tmp_path: Path):
    shards = write_folder(tmp_path / "shards", make_samples(400), per_shard=4)
    cache = tmp_path / "cache"
    killed = make(shards, cache)
    until(lambda: list(cache.glob("corpus/.tmp-*/first_values.npy")), killed)
    killed.kill()
    killed.communicate()
    assert not [p for p in (cache / "corpus").iterdir() if p.name[0] != "." and p.suffix != ".lock"]
    other = cache / "corpus" / ".tmp-of-other-texts"  # which nobody makes any more
    other.mkdir()
    together = [make(shards, cache) for _ in range(3)]
    said = [process.communicate(timeout=120) for process in together]
    assert len({out for out, _ in said}) == 1, said
    assert [p.suffix for p in (cache / "corpus").iterdir()] == [""]


def test_what_others_may_be_making_stays_where_there_are_no_locks(
    samples: list[Sample], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    folder, others = write_folder(tmp_path / "s", samples[:3]), tmp_path / "cache" / "corpus" / ".tmp-of-other-texts"
    others.mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", no_locks)
        load(folder, tokenizer, tmp_path / "cache")
    assert others.is_dir()


def test_a_kill_while_a_corpus_takes_anothers_place_costs_nothing(
    samples: list[Sample], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shards, cache = write_folder(tmp_path / "s", samples[:3]), tmp_path / "cache"
    load(shards, tokenizer, cache)
    (made,) = (cache / "corpus").iterdir()
    made.rename(made.with_name(f".old-{made.name}"))
    monkeypatch.setattr(corpora, "_make", None)
    assert len(load(shards, tokenizer, cache)) > 0
    assert [path.name for path in (cache / "corpus").iterdir()] == [made.name]


def test_texts_of_which_no_token_is_left_are_no_triples(samples: list[Sample], tokenizer: Tokenizer, tmp_path: Path):
    blank = [
        Text(kind="caption", source="c", id="0", text=" \u200b "),
        Text(kind="qa", source="q", id="1", question="who?"),
    ]
    corpus = load(rewritten(tmp_path / "s", samples[:4], 0, texts=blank), tokenizer, tmp_path / "cache")
    assert set(corpus.image) == {1, 2}
    assert corpus.textless == 2


def test_shards_without_any_text_are_refused(samples: list[Sample], tokenizer: Tokenizer, tmp_path: Path):
    folder = write_folder(tmp_path / "s", [dataclasses.replace(s, texts=[]) for s in samples[:3]])
    with pytest.raises(UsageError, match="none of its 3 images has a text; extract with --captions"):
        load(folder, tokenizer, tmp_path / "cache")


def test_an_unknown_kind_of_text_is_refused_by_name(samples: list[Sample], tokenizer: Tokenizer, tmp_path: Path):
    odd = [Text(kind="poem", source="c", id="0", text="o cat")]
    folder = rewritten(tmp_path / "s", samples[:4], 1, texts=odd)
    with pytest.raises(UsageError, match="image-001 has a text of kind 'poem'"):
        load(folder, tokenizer, tmp_path / "cache")


def test_a_hash_that_all_images_claim_to_have_tells_nothing(
    tokenizer: Tokenizer, samples: list[Sample], tmp_path: Path
):
    def with_hashes(hashes: list[str]) -> list[int]:
        changed = [
            dataclasses.replace(s, image=dataclasses.replace(s.image, sha256=h))
            for s, h in zip(samples, hashes, strict=False)
        ]
        folder = write_folder(tmp_path / str(len(hashes)), changed)
        return load(folder, tokenizer, tmp_path / "cache").images.content.tolist()

    assert with_hashes(["0" * 64] * 20) == [0] * 20
    some = with_hashes(["a", "b", "a", "", "c"])
    assert some[0] == some[2] != some[1]
    assert some[3] == 0
    assert len(set(some)) == 4


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
