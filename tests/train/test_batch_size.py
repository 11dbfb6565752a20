"""`--batch-size auto`: the largest that fits, found from two small ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import error_line, train

from oscar_common.errors import UsageError
from oscar_common.settings import AUTO, Train
from oscar_train import batch_size
from oscar_train.batch_size import MOST, fits, largest_batch
from oscar_train.ranks import Ranks
from oscar_train.weights import open_init

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

    def found(free: float, **changes: int) -> int:
        monkeypatch.setattr(batch_size, "free_memory", lambda: int(free * GB))
        return largest_batch(replace(settings, **changes), start, 24, ONE)

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
