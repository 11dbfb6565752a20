"""Fine-tuning as a user starts it: each task resumes, spreads over ranks and takes signals as pre-training does."""

import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from running import ENVIRONMENT, finish, has_row, rows, wait
from support import error_line, run_here
from task_shards import write_task_shards

from oscar_train.evaluation.command import command as EVALUATE
from oscar_train.predict_command import command as PREDICT
from oscar_train.tasks.finetune import command as FINETUNE

finetune, predict = partial(run_here, FINETUNE), partial(run_here, PREDICT)
TASKS = ("retrieval", "vqa", "gqa", "nlvr2")
SETTINGS = (
    *("--init", "random:tiny", "--batch-size", "4", "--lr", "1e-3", "--device", "cpu", "--steps", "6"),
    *("--checkpoint-every", "3", "--eval-fraction", "0.3", "--eval-images", "4", "--text-length", "24"),
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def line_of(task: str, shards: Path, out: Path) -> tuple[object, ...]:
    few = ("--min-answers", "1") if task == "vqa" else ()
    return (task, "--shards", shards, "--out", out, *SETTINGS, *few)


def start(*arguments: object, ranks: int = 1) -> "subprocess.Popen[str]":
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    line = [sys.executable, *torchrun, "-m", "oscar_train.tasks.finetune", *map(str, arguments)]
    return subprocess.Popen(line, text=True, stdout=-1, stderr=-1, env=ENVIRONMENT)


GQA = pytest.param("gqa", marks=pytest.mark.slow)  # which is VQA but for its loss


@pytest.fixture(scope="module", params=["retrieval", "vqa", GQA, "nlvr2"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A task, its shards, and an undisturbed run of it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    shards = write_task_shards(request.param, folder / "shards")
    done = finetune(*line_of(request.param, shards, folder / "run"))
    assert done.returncode == 0, done.stderr
    assert "held out: " in done.stdout
    return request.param, shards, folder / "run"


def assert_same(out: Path, other: Path) -> None:
    """The same curve, and the same bytes in the end."""
    assert rows(out) == rows(other)
    assert (out / "evaluation.csv").read_bytes() == (other / "evaluation.csv").read_bytes()
    for path in (other / "checkpoint-000006").iterdir():
        assert (out / "checkpoint-000006" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(run: tuple[str, Path, Path], tmp_path: Path):
    task, _, undisturbed = run
    out = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    shutil.rmtree(out / "checkpoint-000006")
    done = finetune(task, "--resume", out)
    assert "going on after step 3 of 6" in done.stdout, done.stderr
    assert_same(out, undisturbed)


def test_parts_change_the_rounding_alone(run: tuple[str, Path, Path], tmp_path: Path):
    task, shards, undisturbed = run
    done = finetune(*line_of(task, shards, tmp_path / "run"), "--accumulate", "2")
    assert done.returncode == 0, done.stderr
    for one, other in zip(rows(tmp_path / "run"), rows(undisturbed), strict=True):
        np.testing.assert_allclose(float(one["loss"]), float(other["loss"]), rtol=1e-4)


@pytest.mark.slow
def test_ranks_change_the_rounding_alone(run: tuple[str, Path, Path], tmp_path: Path):
    task, shards, undisturbed = run
    finish(start(*line_of(task, shards, tmp_path / "run"), ranks=2))
    for one, other in zip(rows(tmp_path / "run"), rows(undisturbed), strict=True):
        np.testing.assert_allclose(float(one["loss"]), float(other["loss"]), rtol=1e-4)


@pytest.mark.slow
def test_a_signal_saves_and_goes_on_exactly(run: tuple[str, Path, Path], tmp_path: Path):
    task, shards, undisturbed = run
    out = tmp_path / "run"
    process = start(*line_of(task, shards, out))
    wait(process, lambda: has_row(out, 1))
    process.send_signal(signal.SIGUSR1)
    errors = finish(process, 138)[1]
    assert re.search(r"stopped by SIGUSR1 after step \d, which is saved", errors)
    done = finetune(*line_of(task, shards, out))
    assert done.returncode == 0, done.stderr
    assert_same(out, undisturbed)


def test_a_finished_run_is_evaluated_by_command_to_the_same_numbers(run: tuple[str, Path, Path], tmp_path: Path):
    _, _, undisturbed = run
    done = run_here(EVALUATE, undisturbed, "--images", 4, "--json", tmp_path / "numbers.json")
    assert done.returncode == 0, done.stderr
    last = (undisturbed / "evaluation.csv").read_text().splitlines()[-1].split(",")
    loss = float(last[1])
    assert f"{loss:.4g}" in done.stdout


def test_answers_about_photos(run: tuple[str, Path, Path], tmp_path: Path):
    task, shards, undisturbed = run
    if task == "retrieval":
        done = predict("answer", "--model", undisturbed, "--shards", shards, "what is that?")
        assert "fine-tuned for retrieval" in error_line(done)
        return
    if task == "nlvr2":
        return
    done = predict("answer", "--model", undisturbed, "--shards", shards, "what is that?", "--json", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 24
    assert done.stdout.startswith("0.jpg: ")


def test_what_makes_no_sense_is_one_line(tmp_path: Path):
    shards = write_task_shards("retrieval", tmp_path / "shards")
    for arguments, message in (
        (line_of("nlvr2", shards, tmp_path / "a"), "no two images whose keys end in -img0 and -img1"),
        ((*line_of("vqa", shards, tmp_path / "b")[:-2], "--min-answers", "99"), "--min-answers 99: none of the"),
        ((*line_of("vqa", shards, tmp_path / "c"), "--annotations", tmp_path / "no.json"), "No such file"),
        ((*line_of("retrieval", shards, tmp_path / "d"), "--recipe", "vqa-base"), "it is for task vqa"),
        ((*line_of("retrieval", shards, tmp_path / "e"), "--text-length", "600"), "between 8 and 512"),
    ):
        done = finetune(*arguments)
        assert done.returncode == 2, done.stderr
        assert message in error_line(done)


def test_help_names_each_task_and_is_quick():
    environment = {**os.environ, "COLUMNS": "100"}
    line = [sys.executable, "-X", "importtime", "-m", "oscar_train.tasks.finetune", "--help"]
    done = subprocess.run(line, text=True, capture_output=True, env=environment, check=True)
    assert all(task in done.stdout for task in TASKS)
    assert " torch\n" not in done.stderr
