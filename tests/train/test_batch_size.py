"""`--batch-size auto`: the largest that fits, found from two small ones."""

import resource
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import error_line, oscar, train

from oscar_common.errors import OperationError, UsageError
from oscar_common.settings import AUTO, Train
from oscar_train.checkpoints.init import build, open_init
from oscar_train.data.stream import Stream
from oscar_train.ranks import Ranks
from oscar_train.training import auto_batch_size
from oscar_train.training.auto_batch_size import MOST, check_part, check_weights, fits, largest_batch
from oscar_train.training.step import make_train_state

ONE = Ranks(0, 1, torch.device("cpu"))
GB = 10**9


def test_the_answer_lies_on_the_line_and_is_a_multiple_of_eight():
    peaks = (3 * GB, 4 * GB)  # 2 GB and a quarter for each triple
    assert fits((4, 8), peaks, 20 * GB) == 64  # 18 GB may be filled
    assert fits((4, 8), peaks, 21 * GB) == 64
    assert fits((4, 8), peaks, 23 * GB) == 72
    assert fits((4, 8), peaks, 4 * GB) == 6
    assert fits((4, 8), peaks, 2 * GB) == 0
    answers = [fits((4, 8), peaks, free * GB) for free in range(1, 100)]
    assert answers == sorted(answers)


def test_what_cannot_be_measured_is_said():
    with pytest.raises(UsageError, match="--batch-size auto: what a triple takes cannot be measured here"):
        fits((4, 8), (GB, GB), 20 * GB)


def test_a_real_model_gets_as_many_triples_as_there_is_memory_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    settings, start = Train(batch_size=AUTO), open_init("random:tiny")

    def found(free: float, triples: int = 10**6, **changes: int) -> int:
        monkeypatch.setattr(auto_batch_size, "free_memory", lambda processes: int(free * GB))
        return largest_batch(replace(settings, **changes), start, 24, ONE, triples)

    few, more = found(1), found(4)
    assert 16 <= few < more < MOST
    assert few % 8 == more % 8 == 0
    assert found(1000) == found(1000, accumulate=4) == MOST
    assert found(1000, accumulate=3) == 4080
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"--batch-size auto: {few} triples a step, {few} at a time; 4 and 16 took 0.")
    assert first.endswith(" GB, 1.00 GB are free")
    assert last.startswith("--batch-size auto: 4080 triples a step, 1360 at a time; ")
    assert last.endswith("; more than 4096 are never chosen")
    assert found(1000, triples=56) == 7
    assert found(1000, triples=5000) == 624
    assert found(1000, triples=56, accumulate=4) == 4
    assert "; more than an eighth of the 5,000 triples are never chosen" in capsys.readouterr().out
    with pytest.raises(UsageError, match="not even a single triple fits; try --activation-checkpointing"):
        found(0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("most", "error: Invalid value for '--batch-size': 'most' is no whole number, or auto"),
        ("1", "error: --batch-size: 1 is out of range; it must be at least 2, or auto"),
        ("0", "error: --batch-size: 0 is out of range; it must be at least 2, or auto"),
    ],
)
def test_another_word_or_a_number_too_small_is_one_line(given: str, message: str):
    done = train("--batch-size", given)
    assert done.returncode == 2
    assert error_line(done) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("most", "batch_size: 'most' is no whole number, or auto"),
        ("0", "batch_size: 0 is out of range; it must be at least 2, or auto"),
        ("2.5", "batch_size: 2.5 is no whole number, or auto"),
    ],
)
def test_so_it_is_in_yaml(tmp_path: Path, given: str, message: str):
    (tmp_path / "p.yaml").write_text(f"recipes: {{mine: {{batch_size: {given}}}}}")
    done = train("--pipelines", tmp_path / "p.yaml", "--recipe", "mine")
    assert done.returncode == 2
    assert error_line(done) == f"error: {tmp_path / 'p.yaml'}: recipes.mine: {message}"


def test_auto_may_stand_wherever_settings_do(tmp_path: Path):
    from oscar_common.config import load_catalog

    (tmp_path / "p.yaml").write_text("recipes: {a: {batch_size: auto}, b: {batch_size: 48}}")
    recipes = load_catalog(tmp_path / "p.yaml").recipes
    assert (recipes["a"].batch_size, recipes["b"].batch_size) == (AUTO, 48)
    done = train("--pipelines", tmp_path / "p.yaml", "--recipe", "b", "--batch-size", "auto")
    assert "--shards is missing" in error_line(done)


def limited(gigabytes: float, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run `oscar-train` with so much address space."""
    return oscar("oscar-train", *arguments, limits={resource.RLIMIT_AS: round(gigabytes * GB)})


@pytest.mark.parametrize(
    "gigabytes",
    [pytest.param(4.5, marks=pytest.mark.slow), 14],  # too few for a model's first step; enough, but not for this batch
)
def test_a_batch_that_does_not_fit_is_refused_before_it_is_taken(shards: Path, tmp_path: Path, gigabytes: float):
    done = limited(gigabytes, "--shards", shards, "--out", tmp_path / "run", "--batch-size", 100_000, "--device", "cpu")
    assert done.returncode == 1, done.stderr
    assert error_line(done).startswith(
        "error: --batch-size 100000: does not fit into the memory in --accumulate 1 part"
    )
    assert error_line(done).endswith(
        "give a larger --accumulate, --activation-checkpointing, a smaller --batch-size or a smaller model"
    )
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_what_will_be_needed_is_known_from_two_small_batches(stream: Stream, monkeypatch: pytest.MonkeyPatch):
    def check(free: float, part: int, **changes: int) -> None:
        monkeypatch.setattr(auto_batch_size, "free_memory", lambda processes: int(free * GB))
        settings = replace(Train(batch_size=part), **changes)
        model, _ = build(open_init("random:tiny"), stream.corpus.feature_dim, 1)
        check_part(make_train_state(model, settings, ONE), replace_size(stream, part))

    check(4, 64)
    check(1000, 100_000)
    check(20, 4096, accumulate=64)
    with pytest.raises(OperationError, match=r"about \d+\.\d GB are needed, 3\.0 GB are free"):
        check(3, 4096)
    with pytest.raises(OperationError, match=r"--batch-size 64: .* GB are needed, 0\.0 GB are free"):
        check(0.01, 64)


def replace_size(stream: Stream, size: int) -> Stream:
    """The same stream with another batch size."""
    return Stream(stream.corpus, stream.reader, seed=1, batch_size=size)


def test_a_model_too_large_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(auto_batch_size, "free_memory", lambda processes: 5 * GB)
    start = open_init("random:large")
    with pytest.raises(OperationError, match=r"about 5\.4 GB are needed, 5\.0 GB are free.* or a smaller model"):
        check_weights(Train(batch_size=2), start, 2048, ONE)
    monkeypatch.setattr(auto_batch_size, "free_memory", lambda processes: 6 * GB)
    check_weights(Train(batch_size=2), start, 2048, ONE)
    assert not hasattr(start.config, "img_feature_dim")  # as it was
