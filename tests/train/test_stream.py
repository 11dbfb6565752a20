"""The stream: every triple once an epoch, the same for any ranks, threads, batch sizes and interruptions."""

import dataclasses
import random
import shutil
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_shards import make_samples, write_folder

from oscar_common.errors import OperationError, UsageError
from oscar_common.sample import Sample
from oscar_train.batch import IGNORED, Batch
from oscar_train.data.corpus import Corpus
from oscar_train.data.sampling.negatives import make_pools, replaced
from oscar_train.data.sampling.philox import SAMPLE, words
from oscar_train.data.sampling.triples import _CANDIDATES, _PART, _WIDTH
from oscar_train.data.stream import Stream, open_stream
from oscar_train.data.texts.tags import TagRule
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.objectives import MATCHED, OSCAR, TABLE

STEPS = 30
Copy = dict[str, torch.Tensor]


def copied(batch: Batch) -> Copy:
    return {f.name: getattr(batch, f.name).clone() for f in fields(Batch)}


def negatives(corpus: Corpus, triples: np.ndarray, weights: list[int], seed: int) -> np.ndarray:
    """Return whose q each triple gets."""
    drawn = words(seed, SAMPLE, 0, 0, len(triples), _WIDTH)
    pools = make_pools(corpus, [Fraction(weight) for weight in weights], OSCAR)
    return replaced(corpus, pools, OSCAR, triples, drawn[:, _PART], drawn[:, _CANDIDATES]).q


def assert_equal(one: Copy, other: Copy, where: object) -> None:
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), (where, name)


def opened(shards: Path, tokenizer: Tokenizer, **options: Any) -> AbstractContextManager[Stream]:
    return open_stream([str(shards)], tokenizer=tokenizer, **{"batch_size": 16, "window": 2, **options})


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tokenizer: Tokenizer) -> list[Copy]:
    """The batches of one rank with one thread."""
    with opened(shards, tokenizer, threads=1) as stream:
        return [copied(batch) for batch in stream.batches(0, STEPS)]


@pytest.mark.parametrize(("ranks", "threads"), [(1, 4), (2, 4), (8, 1), (16, 3)])
def test_batches_do_not_depend_on_ranks_and_threads(
    shards: Path, tokenizer: Tokenizer, undisturbed: list[Copy], ranks: int, threads: int
):
    shares = []
    for rank in range(ranks):
        with opened(shards, tokenizer, threads=threads, rank=rank, ranks=ranks) as stream:
            shares.append([copied(batch) for batch in stream.batches(0, STEPS)])
    for step in range(STEPS):
        whole = {name: torch.cat([share[step][name] for share in shares]) for name in shares[0][step]}
        assert_equal(whole, undisturbed[step], step)


@pytest.mark.parametrize("name", TABLE, ids="-".join)
def test_batches_of_no_objective_depend_on_ranks(shards: Path, tokenizer: Tokenizer, name: tuple[str, str]):
    options = {"objective": replace(TABLE[name], whole_words=True), "tags": TagRule(budget=2)}
    with opened(shards, tokenizer, threads=2, **options) as stream:
        whole = [copied(batch) for batch in stream.batches(5, 9)]
    for rank in range(4):
        with opened(shards, tokenizer, threads=3, rank=rank, ranks=4, **options) as stream:
            for step, batch in enumerate(stream.batches(5, 9)):
                share = {name: tensor[4 * rank : 4 * rank + 4] for name, tensor in whole[step].items()}
                assert_equal(copied(batch), share, step)


@pytest.mark.parametrize(("threads", "least"), [(3, 4), (4, 4), (5, 1)])
def test_batches_do_not_depend_on_how_threads_share_them(
    shards: Path,
    tokenizer: Tokenizer,
    undisturbed: list[Copy],
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    least: int,
):
    monkeypatch.setattr("oscar_train.data.stream.LEAST", least)
    with opened(shards, tokenizer, threads=threads) as stream:
        batches = [copied(batch) for batch in stream.batches(0, STEPS)]
        assert len({batch.features.data_ptr() for batch in stream.batches(0, STEPS)}) == 2
    for step, batch in enumerate(batches):
        assert_equal(batch, undisturbed[step], step)


def test_twenty_interruptions_change_nothing(shards: Path, tokenizer: Tokenizer, undisturbed: list[Copy]):
    chance = random.Random(5)
    step = 0
    for _ in range(20):
        with opened(shards, tokenizer, threads=chance.randint(1, 4)) as stream:
            for batch in stream.batches(step, STEPS):
                assert_equal(copied(batch), undisturbed[step], step)
                step = (step + 1) % STEPS
                if chance.random() < 0.3:
                    break  # with later batches still in the making


def test_the_text_of_a_position_does_not_depend_on_the_batch_size(shards: Path, tokenizer: Tokenizer):
    texts = []
    for batch_size, steps in ((16, 21), (48, 7), (336, 1)):
        with opened(shards, tokenizer, batch_size=batch_size) as stream:
            parts = [stream.text(step) for step in range(steps)]
        texts.append({f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(parts[0])})
    for other in texts[1:]:
        for name, array in texts[0].items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("batch_size", [16, 2, 127, 382])
def test_every_epoch_is_every_triple_once_and_nothing_is_dropped(shards: Path, tokenizer: Tokenizer, batch_size: int):
    with opened(shards, tokenizer, batch_size=batch_size) as stream:
        n = len(stream.corpus)
        assert n == 127
        seen = np.concatenate([stream.triples(step) for step in range(-(-3 * n // batch_size))])[: 3 * n].reshape(3, n)
        assert [stream.epoch(step) for step in (0, (n - 1) // batch_size)] == [0, 0]
        assert stream.epoch(-(-n // batch_size)) >= 1
    for epoch in seen:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(n))
    assert not (seen[0] == seen[1]).all()


def test_a_batch_is_what_the_samples_say(shards: Path, samples: list[Sample], tokenizer: Tokenizer):
    """Against the samples themselves, with masks undone."""
    with opened(shards, tokenizer) as stream:
        for batch in stream.batches(0, 8):
            ids = torch.where(batch.mlm_labels == IGNORED, batch.input_ids, batch.mlm_labels)
            for row, triple in enumerate(batch.triples.tolist()):
                sample = samples[int(stream.corpus.image[triple])]
                k = min(len(sample.regions.tags), 50)
                assert batch.region_mask[row].sum() == k
                assert batch.region_mask[row, :k].all()
                np.testing.assert_array_equal(batch.features[row, :k], sample.regions.features[:k])
                assert not batch.features[row, k:].any()
                seen = tokenizer.backend.decode(ids[row][batch.attention_mask[row]])
                w, _, q = seen.removeprefix("[CLS]").removesuffix("[SEP]").partition("[SEP]")
                texts = [t.question if t.kind == "qa" else t.text for t in sample.texts]
                words = [
                    tokenizer.backend.decode(tokenizer.backend(t, add_special_tokens=False)["input_ids"]) for t in texts
                ]
                matched = batch.match_labels[row] == OSCAR.label(MATCHED)
                own = [" ".join(sample.regions.tags), *(t.answer for t in sample.texts if t.kind == "qa")]
                assert any(t.startswith(w.strip()) for t in words) == (matched or bool(q))  # without q, w is replaced
                if matched:
                    assert any(o.startswith(q.strip()) for o in own)
                elif q:
                    answer = q.split()[0] in ("yes", "no", "two")
                    assert q not in own if answer else {*q.split()} != {*own[0].split()}


def test_shapes_and_types(stream: Stream):
    batch = stream.batch(0, stream.buffer())
    shapes = {f.name: (tuple(getattr(batch, f.name).shape), getattr(batch, f.name).dtype) for f in fields(Batch)}
    assert shapes == {
        "input_ids": ((16, 35), torch.int64),
        "token_type_ids": ((16, 35), torch.int64),
        "attention_mask": ((16, 35), torch.bool),
        "mlm_labels": ((16, 35), torch.int64),
        "features": ((16, 50, 24), torch.float16),
        "z": ((16, 50, 6), torch.float32),
        "region_mask": ((16, 50), torch.bool),
        "match_labels": ((16,), torch.int64),
        "dropout_seeds": ((16,), torch.int64),
        "triples": ((16,), torch.int64),
    }
    assert torch.equal(batch.attention_mask, batch.input_ids != 0)


def test_a_part_of_a_batch_is_the_same_memory(stream: Stream):
    batch = stream.batch(0, stream.buffer())
    part = batch.part(4, 10)
    for f in fields(Batch):
        assert torch.equal(getattr(part, f.name), getattr(batch, f.name)[4:10])
    part.dropout_seeds.fill_(7)
    assert (batch.dropout_seeds == 7).tolist() == [4 <= row < 10 for row in range(16)]


def test_keys_are_those_of_all_ranks(shards: Path, samples: list[Sample], tokenizer: Tokenizer):
    with opened(shards, tokenizer, rank=1, ranks=2) as second, opened(shards, tokenizer) as stream:
        triples = stream.triples(12)
        assert stream.keys(12) == second.keys(12) == [samples[i].key for i in stream.corpus.image[triples]]


@pytest.mark.parametrize(
    ("cores", "ranks", "here", "threads"),
    [(6, 4, "2", 3), (6, 1, "2", 6), (2, 8, "8", 1), (64, 8, "2", 8), (5, 2, None, 5)],
)
def test_ranks_of_a_machine_share_its_cores(
    shards: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    ranks: int,
    here: str | None,
    threads: int,
):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    if here is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    with opened(shards, tokenizer, ranks=ranks) as stream:
        assert stream.threads == threads


def test_features_alone_are_those_of_the_batches(stream: Stream, undisturbed: list[Copy]):
    plain = [batch.features.clone() for batch in stream.batches(3, 9)]
    alone = [features.clone() for features in stream.regions(3, 9)]
    assert all(torch.equal(a, b) for a, b in zip(plain, alone, strict=True))


def test_memory_is_used_again(shards: Path, tokenizer: Tokenizer):
    with opened(shards, tokenizer, threads=3) as stream:
        assert len({batch.features.data_ptr() for batch in stream.batches(0, 20)}) == 4


def test_ranks_that_do_not_divide_the_batch_are_refused(shards: Path, tokenizer: Tokenizer):
    with (
        pytest.raises(UsageError, match="--batch-size 16: not a multiple of the 3 ranks"),
        opened(shards, tokenizer, ranks=3),
    ):
        pass


@pytest.fixture(scope="module")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty more images, under keys of their own, but the first five are of the first folder."""
    samples = make_samples(60)
    mine = [*samples[:5], *samples[40:55]]
    return write_folder(tmp_path_factory.mktemp("other") / "shards", mine, per_shard=6)


def test_mixed_folders_come_as_often_as_their_weights_say(shards: Path, other_shards: Path, tokenizer: Tokenizer):
    def mixed(**options: Any) -> AbstractContextManager[Stream]:
        both = [str(shards), str(other_shards)]
        return open_stream(both, tokenizer=tokenizer, batch_size=8, mix=[2, 0.5], window=2, **options)

    with mixed() as stream:
        first = int(stream.corpus.shard_triples[stream.corpus.source_shards[1]])
        total = len(stream.corpus)
        assert first == 127
        times = Counter(t for step in range((4 * 127 + total - 127) // 8) for t in stream.triples(step).tolist())
        assert all(times[t] in ((3, 4) if t < first else (0, 1)) for t in range(total))
        batches = [copied(batch) for batch in stream.batches(0, 20)]
    for rank in (0, 1):
        with mixed(rank=rank, ranks=2, threads=3) as stream:
            for step, batch in enumerate(stream.batches(0, 20)):
                half = {name: tensor[4 * rank : 4 * rank + 4] for name, tensor in batches[step].items()}
                assert_equal(copied(batch), half, step)


def test_negatives_of_mixed_folders_are_of_other_images_wherever_these_are(
    shards: Path, other_shards: Path, tokenizer: Tokenizer
):
    with open_stream([str(shards), str(other_shards)], tokenizer=tokenizer, batch_size=64) as stream:
        corpus = stream.corpus
    triples = np.resize(np.arange(len(corpus)), 12_000)
    found = negatives(corpus, triples, [1, 3], seed=1)
    changed = np.flatnonzero(found != triples)
    assert len(changed) > 5000
    of_second = 0
    for n in changed:
        mine, others = int(corpus.image[triples[n]]), int(corpus.image[found[n]])
        assert corpus.key(mine) != corpus.key(others)
        of_second += others >= 40
    weights = 3 * 20 / (40 + 3 * 20)  # nearly: some images have a question more, some no tags
    assert of_second / len(changed) == pytest.approx(weights, abs=0.06)


def test_a_copy_of_an_image_under_another_key_is_no_negative(
    samples: list[Sample], tokenizer: Tokenizer, tmp_path: Path
):
    """The bytes of the file tell: here each image is in both folders."""

    def folder(name: str) -> Path:
        mine = [
            dataclasses.replace(s, key=f"{name}-{n}", image=dataclasses.replace(s.image, sha256=f"{n:064x}"))
            for n, s in enumerate(samples[:5])
        ]
        return write_folder(tmp_path / name, mine)

    with open_stream([str(folder("a")), str(folder("b"))], tokenizer=tokenizer, batch_size=8) as stream:
        corpus = stream.corpus
    triples = np.resize(np.arange(len(corpus)), 4000)
    found = negatives(corpus, triples, [1, 1], seed=1)
    pairs = {
        (int(corpus.image[t]), int(corpus.image[other])) for t, other in zip(triples, found, strict=True) if other != t
    }
    assert len(pairs) > 20
    assert all(mine % 5 != other % 5 for mine, other in pairs)


def test_folders_of_different_detectors_are_not_mixed(shards: Path, tmp_path: Path, samples: list[Sample]):
    wide = [
        dataclasses.replace(s, regions=dataclasses.replace(s.regions, features=np.repeat(s.regions.features, 2, 1)))
        for s in samples
    ]
    other = write_folder(tmp_path / "wide", wide, feature_dim=48)
    with (
        pytest.raises(
            UsageError, match=r"wide: its detector has feature_dim 48, that of .*shards 24; .* cannot be mixed"
        ),
        open_stream([str(shards), str(other)], batch_size=8),
    ):
        pass


def test_an_error_comes_at_its_step_and_not_before(shards: Path, tokenizer: Tokenizer, tmp_path: Path):
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    with opened(copy, tokenizer, batch_size=4, window=1) as stream:
        corpus = stream.corpus
        needed = [set(corpus.images.shard[corpus.image[stream.triples(step)]].tolist()) for step in range(30)]
        first = {shard: min(step for step in range(30) if shard in needed[step]) for shard in range(5)}
        last = max(first, key=lambda shard: first[shard])
        assert first[last] > 3
        (copy / f"shard-{last:06d}.tar").unlink()
        batches = stream.batches(0, 30)
        for _ in range(first[last]):
            next(batches)
        with pytest.raises(OperationError, match=rf"shard-00000{last}\.tar: image image-\d+: its tar cannot be read"):
            next(batches)
