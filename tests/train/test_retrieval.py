"""Retrieval: what its rows are, how ranks are counted, and search, each against a slow reference."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small_shards import make_samples, write_folder
from support import error_line, run_here

from oscar_common.sample import Sample
from oscar_train.batch import IGNORED
from oscar_train.data.sampling.shape import Shape
from oscar_train.data.stream import Stream, open_stream
from oscar_train.data.texts.phrases import CAPTION
from oscar_train.data.texts.ragged import ragged
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.predict.model import TaskModel, open_model
from oscar_train.predict.photos import Photos, open_photos
from oscar_train.predict.search import likeness, score, search
from oscar_train.predict_command import command as PREDICT
from oscar_train.tasks.finetune import command as FINETUNE
from oscar_train.tasks.recalls import ranks_of_images, ranks_of_texts, recalls
from oscar_train.tasks.retrieval import MATCHED, WRONG, make_composer

SHAPE = Shape(rows=2, labels=2, tokens=20, regions=8)
predict = partial(run_here, PREDICT)


@pytest.fixture(scope="module")
def pairs(shards: Path, tokenizer: Tokenizer) -> Iterator[Stream]:
    make = partial(make_composer, shape=SHAPE)

    def captions(corpus):
        return np.flatnonzero(corpus.kind == CAPTION)

    with open_stream(
        [str(shards)], batch_size=16, tokenizer=tokenizer, shape=SHAPE, composer=make, only=captions
    ) as opened:
        yield opened


def row_of(tokenizer: Tokenizer, caption: str, tags: list[str]) -> list[int]:
    """`[CLS] caption [SEP] tags [SEP]` in 20 tokens, by the steps of the released script."""
    encode = partial(tokenizer.backend.encode, add_special_tokens=False)
    tokens = [tokenizer.cls, *encode(caption)[:18], tokenizer.sep]
    words = encode(" ".join(tags))[: max(0, 20 - len(tokens) - 1)]
    tokens += [*words, tokenizer.sep] if words else []
    return tokens + [tokenizer.pad] * (20 - len(tokens))


def test_rows_are_a_matched_and_a_wrong_pair(pairs: Stream, samples: list[Sample], tokenizer: Tokenizer):
    by_key = {sample.key: sample for sample in samples}
    kinds: Counter[str] = Counter()
    for step in range(12):
        buffer = pairs.buffer()
        batch = pairs.batch(step, buffer)
        assert batch.input_ids.shape == (32, 20)
        assert batch.features.shape[:2] == (32, 8)
        for row, triple in enumerate(batch.triples.tolist()):
            own = by_key[pairs.corpus.key(int(pairs.corpus.image[triple]))]
            captions = [text.text for text in own.texts if text.kind == "caption"]
            own_rows = [row_of(tokenizer, caption, own.regions.tags) for caption in captions]
            features = torch.from_numpy(own.regions.features[:8])
            shows_own = torch.equal(batch.features[row, : len(features)], features) and len(features) == int(
                batch.region_mask[row].sum()
            )
            ids, label = batch.input_ids[row].tolist(), int(batch.match_labels[row])
            if row % 2 == 0:
                assert label == MATCHED
                assert ids in own_rows
                assert shows_own
                continue
            assert label in (WRONG, IGNORED)
            kinds["caption" if shows_own else "image"] += 1
            text = ids[1 : ids.index(tokenizer.sep)]
            if not shows_own:  # the caption stays, and the tags are those of the other image
                assert text in [line[1 : line.index(tokenizer.sep)] for line in own_rows]
            else:
                assert ids not in own_rows
    assert 0.35 < kinds["caption"] / kinds.total() < 0.65


def test_rows_are_the_same_in_whatever_batch_they_are_asked_for(shards: Path, pairs: Stream, tokenizer: Tokenizer):
    make = partial(make_composer, shape=SHAPE)
    whole = pairs.batch(1, pairs.buffer())
    for rank in range(2):
        with open_stream(
            [str(shards)],
            batch_size=16,
            tokenizer=tokenizer,
            shape=SHAPE,
            composer=make,
            only=lambda corpus: np.flatnonzero(corpus.kind == CAPTION),
            rank=rank,
            ranks=2,
        ) as stream:
            part = stream.batch(1, stream.buffer())
            for name, tensor in vars(part).items():
                assert torch.equal(tensor, getattr(whole, name)[16 * rank : 16 * rank + 16]), name


def test_dropout_of_the_two_rows_differs(pairs: Stream):
    seeds = pairs.batch(0, pairs.buffer()).dropout_seeds
    assert len(set(seeds.tolist())) == 32


def test_ranks_are_those_of_a_slow_count():
    draw = np.random.default_rng(3)
    owner = np.repeat(np.arange(7), [1, 5, 2, 3, 1, 1, 4])
    scores = draw.integers(0, 6, (len(owner), 7)).astype(np.float32)  # many ties
    scores[2, 3] = np.nan
    of_images, of_texts = ranks_of_images(scores, owner), ranks_of_texts(scores, owner)
    for text, image in enumerate(owner):
        better = [other for other in range(7) if other != image and not scores[text, other] < scores[text, image]]
        assert of_images[text] == 1 + len(better)
    for image in range(7):
        own = [scores[text, image] for text in np.flatnonzero(owner == image) if not np.isnan(scores[text, image])]
        best = max(own, default=-np.inf)
        others = [scores[text, image] for text in np.flatnonzero(owner != image)]
        assert of_texts[image] == 1 + sum(not other < best for other in others)


def test_a_model_that_says_the_same_of_all_finds_nothing():
    owner = np.repeat(np.arange(20), 5)
    values = recalls(np.zeros((100, 20), np.float32), owner)
    assert values["text_to_image_r1"] == values["image_to_text_r10"] == 0
    assert recalls(np.eye(20, dtype=np.float32)[owner], owner)["image_to_text_r1"] == 1


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("search") / "run"
    line = ("retrieval", "--shards", shards, "--out", out, "--steps", 2, "--batch-size", 4, "--device", "cpu")
    done = run_here(FINETUNE, *line, "--text-length", 24)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def model(run: Path) -> TaskModel:
    return open_model(run, "retrieval", "cpu")


@pytest.fixture(scope="module")
def photos(model: TaskModel, shards: Path) -> Photos:
    return open_photos(shards, model)


def test_search_ranks_by_the_scores_of_pairs(model: TaskModel, photos: Photos):
    found = search(model, photos, "a zebra and a sofa", limit=40, candidates=None)
    assert found.scored == found.total == 40
    told = {match.path: match.probability for match in found.matches}
    assert list(told.values()) == sorted(told.values(), reverse=True)
    for path in ("0.jpg", "5.jpg", "4.jpg"):  # 4 has no regions
        np.testing.assert_allclose(score(model, photos, path, "a zebra and a sofa"), told[path], rtol=1e-4)


def test_the_first_look_is_at_tags_and_words(model: TaskModel, photos: Photos, samples: list[Sample]):
    words = model.tokenizer(["a zebra on the sofa"], 20)
    alike = likeness(model, photos.tags, words[0])
    has = [("zebra" in sample.regions.tags) + ("sofa" in sample.regions.tags) for sample in samples]
    assert min(alike[n] for n in range(40) if has[n] == 2) >= max(alike[n] for n in range(40) if has[n] < 2)
    found = search(model, photos, "a zebra on the sofa", limit=40, candidates=has.count(2))
    assert {match.photo for match in found.matches} == {n for n in range(40) if has[n] == 2}
    assert (found.scored, found.total) == (has.count(2), 40)


def test_likeness_is_the_sum_of_the_best_cosines(model: TaskModel):
    rows = ragged([[2482, 3899], [], [4937]])
    words = np.array([1037, 4937, 3899], np.int32)  # "a" is no word to look for
    table = model.network.bert.embeddings.word_embeddings.weight.detach().double()
    table = table - table.mean(0)
    expected = np.zeros(3)
    for number, row in enumerate(([2482, 3899], [], [4937])):
        for word in (4937, 3899):
            cosines = [float(torch.cosine_similarity(table[word], table[token], 0)) for token in row]
            expected[number] += max([0.0, *cosines])
    np.testing.assert_allclose(likeness(model, rows, words), expected, atol=1e-5)


def test_the_command_prints_writes_and_says_what_it_left_out(run: Path, shards: Path, tmp_path: Path):
    line = ("search", "--model", run, "--shards", shards, "a dog", "--candidates", 10, "--limit", 3)
    done = predict(*line, "--json", tmp_path / "found.json", "--html", tmp_path / "found.html")
    assert done.returncode == 0, done.stderr
    assert "the model looked at 10 of 40 photos" in done.stdout
    content = json.loads((tmp_path / "found.json").read_text())
    assert len(content["matches"]) == 3
    assert all(match["path"] in done.stdout for match in content["matches"])
    page = (tmp_path / "found.html").read_text()
    assert all(match["path"] in page for match in content["matches"])
    assert "words of the tags that carried it" in page

    done = predict("search", "--model", run, "--shards", shards, "--image", "7.jpg", "--limit", 2, "--exhaustive")
    assert done.returncode == 0, done.stderr
    assert "Photo" in done.stdout
    assert "looked at" not in done.stdout


def test_what_cannot_be_searched_is_one_line(run: Path, shards: Path, tmp_path: Path):
    wider = [
        replace(s, regions=replace(s.regions, features=np.zeros((len(s.regions.tags), 30), np.float16)))
        for s in make_samples(3)
    ]
    other = write_folder(tmp_path / "other", wider, feature_dim=30)
    with_model = ("search", "--model", run)
    for arguments, message in (
        ((*with_model, "a dog"), "--shards is missing"),
        ((*with_model, "--shards", shards), "TEXT: give a text"),
        ((*with_model, "--shards", tmp_path / "none", "a dog"), "no such folder"),
        ((*with_model, "--shards", other, "a dog"), "its regions have 30 features, the model is for 24"),
        (("search", "--model", tmp_path, "--shards", shards, "a"), f"--model {tmp_path}: neither a model nor a run"),
        ((*with_model, "--images", tmp_path / "none", "a dog"), "give a folder of photos"),
    ):
        done = predict(*arguments)
        assert done.returncode == 2, done.stderr
        assert message in error_line(done)


@pytest.mark.slow
def test_a_tiny_model_learns_to_tell_matched_from_wrong(shards: Path, tmp_path: Path):
    line = ("retrieval", "--shards", shards, "--out", tmp_path / "run", "--eval-fraction", 0.3, "--device", "cpu")
    done = run_here(
        FINETUNE, *line, "--steps", 300, "--batch-size", 16, "--lr", 1e-3, "--eval-images", 0, "--log-every", 50
    )
    assert done.returncode == 0, done.stderr
    last = (tmp_path / "run" / "evaluation.csv").read_text().splitlines()[-1].split(",")
    assert float(last[2]) > 0.75


def test_weights_of_sources_count(shards: Path, pairs: Stream):
    """Wrong captions are drawn from the pool of the sources' weights."""
    compose = make_composer(pairs.corpus, [Fraction(1)], pairs.only, shape=SHAPE)
    triples = pairs.triples(0)
    text, images = compose(triples, 42, 0, 0)
    assert len(text.match_labels) == len(images) == 2 * len(triples)
