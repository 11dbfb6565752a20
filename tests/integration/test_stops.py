"""Signals in the middle of everything, and a run folder that is moved."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import ENVIRONMENT, finish, has_row, launch, launch_fresh, rows, wait
from small_shards import make_samples, write_folder
from support import train

from oscar_train.checkpoints import checkpoint

SETTINGS = ("--init", "random:tiny", "--batch-size", "8", "--lr", "1e-3", "--device", "cpu", "--steps", "12")
FAULTS = os.pathsep.join([str(Path(__file__).parents[1] / "faults"), os.environ.get("PYTHONPATH", "")])
CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGINT: 130}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def complete(*arguments: object) -> str:
    """Train to the end, in this process."""
    done = train(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("stops") / "shards", make_samples(20))


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    complete("--shards", shards, "--out", out, *SETTINGS, "--checkpoint-every", "4")
    return out


def stop(out: Path, shards: Path, number: signal.Signals, when: Callable[[], bool]) -> str:
    """Send a signal to a run when it is there; return its one line."""
    process = launch("--shards", shards, "--out", out, *SETTINGS, "--checkpoint-every", "4")
    wait(process, when)
    process.send_signal(number)
    errors = finish(process, CODES[number])[1]
    assert errors.count("\n") == 1
    assert not list(out.glob(".tmp-*"))
    return errors


def assert_same(out: Path, other: Path) -> None:
    """The same curve, and the same bytes in the end."""
    assert rows(out) == rows(other)
    for path in (other / "checkpoint-000012").iterdir():
        assert (out / "checkpoint-000012" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_in_a_step_or_a_checkpoint_saves_and_goes_on_exactly(
    shards: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals
):
    out = tmp_path / "run"
    line = stop(out, shards, number, lambda: has_row(out, 2))
    step = int(re.search(rf"stopped by {number.name} after step (\d+), which is saved", line)[1])
    assert (out / f"checkpoint-{step:06d}" / "trainer.json").is_file()
    step = (step // 4 + 1) * 4  # the next checkpoint
    line = stop(out, shards, number, lambda: (out / f".tmp-checkpoint-{step:06d}").exists())
    assert f"stopped by {number.name} after step {step}, which is saved" in line
    moved = Path(shutil.move(out, tmp_path / "moved"))
    complete("--resume", moved)
    assert_same(moved, undisturbed)


def test_a_signal_while_token_ids_are_made_leaves_nothing_half(shards: Path, undisturbed: Path, tmp_path: Path):
    cache, out = tmp_path / "cache", tmp_path / "run"
    changes = {"XDG_CACHE_HOME": str(cache)}
    process = launch("--shards", shards, "--out", out, *SETTINGS, "--checkpoint-every", "4", env=changes)
    corpora = cache / "oscar-pretrain" / "corpus"
    wait(process, lambda: any(corpora.glob(".tmp-*")))
    process.send_signal(signal.SIGTERM)
    errors = finish(process, 143)[1]
    assert "error: stopped by SIGTERM " in errors
    assert not list(corpora.glob(".tmp-*"))
    assert not list(out.glob("*/trainer.json")) or "after step" in errors
    complete("--shards", shards, "--out", out, *SETTINGS, "--checkpoint-every", "4", "--cache", corpora.parent)
    assert_same(out, undisturbed)


def test_a_run_and_its_shards_moved_together_go_on_with_resume_alone(
    shards: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(shards, here / "shards")
    monkeypatch.chdir(here)
    complete("--shards", "shards", "--out", "run", *SETTINGS, "--checkpoint-every", "4")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(here / "run" / "checkpoint-000012")
    here.rename(there)
    assert "going on after step 8 of 12" in complete("--resume", there / "run")
    assert_same(there / "run", undisturbed)


@pytest.mark.slow
def test_kills_between_a_save_and_each_removal_cost_no_step(shards: Path, undisturbed: Path, tmp_path: Path):
    """After a checkpoint has its name, after an older one has lost it, and before the next one has it."""
    out, step = tmp_path / "run", 0
    arguments = ("--shards", shards, "--out", out, *SETTINGS, "--checkpoint-every", "1", "--keep", "1")
    for change in (2, 3, 4):
        faults = {"OSCAR_FAULT": "kill", "OSCAR_FAULT_CHANGE": str(change), "PYTHONPATH": FAULTS}
        finish(launch_fresh(*arguments, env={**ENVIRONMENT, **faults}), -signal.SIGKILL)
        last, damages = checkpoint.newest(out)
        assert last is not None
        assert damages == []
        assert last.step > step
        step = last.step

    finish(launch(*arguments))
    assert rows(out) == rows(undisturbed)
    assert [path.name for path in out.glob("*checkpoint-*")] == ["checkpoint-000012"]
    last = "checkpoint-000012/model.safetensors"
    assert (out / last).read_bytes() == (undisturbed / last).read_bytes()


@pytest.mark.slow
def test_twenty_kills_leave_the_curve_as_it_was(shards: Path, undisturbed: Path, tmp_path: Path):
    """kill -9 at a moment drawn for each: before the first step, in a step, while a checkpoint is written."""
    import random

    drawn, out = random.Random(7), tmp_path / "run"
    arguments = ("--shards", shards, "--out", out, *SETTINGS, "--checkpoint-every", "1")
    for _ in range(20):
        done = len(rows(out)) if (out / "metrics.csv").exists() else 0
        process = launch(*arguments)
        if drawn.random() < 0.7 and done < 11:
            wait(process, lambda done=done: has_row(out, done + 1))
        try:
            process.wait(drawn.uniform(0, 0.3))
        except Exception:
            process.kill()
        process.communicate()
    finish(launch(*arguments))
    assert rows(out) == rows(undisturbed)
    last = "checkpoint-000012/model.safetensors"
    assert (out / last).read_bytes() == (undisturbed / last).read_bytes()
