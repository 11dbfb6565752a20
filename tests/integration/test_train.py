"""`oscar-train` as a user runs it: a real kill, a real full disk, real mistakes."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import has_row, launch, rows, wait
from small_shards import make_samples, write_folder
from support import error_line, train

SETTINGS = ("--init", "random:tiny", "--steps", "16", "--batch-size", "8", "--lr", "1e-3", "--checkpoint-every", "5")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("train") / "shards", make_samples(20))


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = launch("--shards", shards, "--out", out, *SETTINGS)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors == f"next: oscar-checkpoint show {out}\n"
    assert "step 16/16" in printed
    assert printed.splitlines()[-1].endswith(f"the model is in {out}/checkpoint-000016")
    return out


def test_logs_and_checkpoints_are_where_they_should_be(undisturbed: Path):
    assert [row["step"] for row in rows(undisturbed)] == [str(n) for n in range(1, 17)]
    assert sorted(p.name for p in undisturbed.iterdir()) == [
        "checkpoint-000015",
        "checkpoint-000016",
        "metrics.csv",
        "run.yaml",
        "starts.jsonl",
        "tensorboard",
    ]
    losses = [float(row["mlm_loss"]) for row in rows(undisturbed)]
    assert losses[0] == pytest.approx(10.4, abs=0.2)
    assert losses[-1] < losses[0] - 0.5


def test_tensorboard_has_every_step_once(undisturbed: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(undisturbed / "tensorboard"))
    events.Reload()
    for name in ("loss", "mlm_loss", "match_loss", "mlm_accuracy", "match_accuracy", "lr", "samples_per_second"):
        assert [e.step for e in events.Scalars(name)] == list(range(1, 17))


def test_killed_and_continued_equals_undisturbed(shards: Path, undisturbed: Path, tmp_path: Path):
    """kill -9 between two checkpoints, then SIGTERM, then to the end: the same numbers and the same bytes."""
    out = tmp_path / "run"
    arguments = ("--shards", shards, "--out", out, *SETTINGS)
    process = launch(*arguments)
    wait(process, lambda: has_row(out, 7))
    process.kill()
    process.communicate()
    assert (out / "checkpoint-000005").is_dir()
    process = launch(*arguments)
    wait(process, lambda: has_row(out, 8) and not has_row(out, 14))
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "going on after step 5 of 16" in printed
    assert re.fullmatch(r"error: stopped by SIGTERM after step \d+, which is saved; .* continues\n", errors)
    torch.set_num_threads(2)  # the others have one; the checkpoint says so
    done = train(*arguments)
    assert torch.get_num_threads() == 1
    assert done.returncode == 0, done.stderr
    assert rows(out) == rows(undisturbed)
    for path in (undisturbed / "checkpoint-000016").iterdir():
        assert (out / "checkpoint-000016" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list(out.glob(".tmp-*"))


def test_the_same_command_on_a_finished_run_says_so(shards: Path, undisturbed: Path):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}
    done = train("--shards", shards, "--out", undisturbed, *SETTINGS)
    assert done.returncode == 0, done.stderr
    assert "complete: all 16 steps are done; the model is in" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")} == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(shards: Path, undisturbed: Path, tmp_path: Path):
    out = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    with (out / "checkpoint-000016" / "optimizer.pt").open("r+b") as file:
        file.truncate(5000)
    done = train("--shards", shards, "--out", out, *SETTINGS)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 2
    assert "warning: " in done.stderr
    assert "checkpoint-000016 is damaged" in done.stderr
    assert "going on from" in done.stderr
    assert rows(out) == rows(undisturbed)


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing_half(shards: Path, tmp_path: Path):
    """Files of more than 20 MB cannot be written; a checkpoint has two."""
    limit = 20 << 20
    out = tmp_path / "run"
    process = launch(
        "--shards", shards, "--out", out, *SETTINGS, "--steps", "2",
        limits={resource.RLIMIT_FSIZE: limit},
    )  # fmt: skip
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 1, errors
    assert errors.count("\n") == 1
    assert "checkpoint-000002: cannot be written" in errors
    assert sorted(p.name for p in out.iterdir()) == ["metrics.csv", "run.yaml", "starts.jsonl", "tensorboard"]


def test_an_other_run_in_out_is_not_continued_and_not_deleted(shards: Path, undisturbed: Path):
    for flag, value, before in (
        ("--seed", 7, 42),
        ("--steps", 20, 16),
        ("--lr", 0.5, 0.001),
        ("--init", "random:base", "random:tiny"),
    ):
        done = train("--shards", shards, "--out", undisturbed, *SETTINGS, flag, value)
        assert done.returncode == 2
        assert error_line(done).startswith(
            f"error: {flag} {value}: the run in --out began with {before}; give another --out"
        )
    other = write_folder(undisturbed.parent / "other", make_samples(8))
    done = train("--shards", other, "--out", undisturbed, *SETTINGS)
    assert done.returncode == 2
    assert "--shards and --texts: their content is not what the run in --out began with" in error_line(done)
    assert len(rows(undisturbed)) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "OUT"], "--shards is missing"),
        (["--shards", "SHARDS"], "--out is missing"),
        (["--shards", "no/such", "--out", "OUT"], "--shards no/such: no such folder"),
        (["--shards", "EMPTY", "--out", "OUT"], "no manifest.json"),
        (["--shards", "CUT", "--out", "OUT"], "shard-000001.tar has 30000 bytes, its index says"),
        (
            ["--shards", "SHARDS", "--out", "OUT", "--init", "random:huge"],
            "no size 'huge' (known: base, large, small, tiny)",
        ),
        (["--shards", "SHARDS", "--out", "OUT", "--init", "./no/bert"], "--init ./no/bert: no such folder"),
        (["--shards", "SHARDS", "--out", "OUT", "--init", "EMPTY"], "has no config.json"),
        (["--shards", "SHARDS", "--out", "OUT", "--init", "no-such/bert"], "not to be had from the Hugging Face hub"),
        (["--shards", "SHARDS", "--out", "FILE"], "is a file; give a folder"),
        (
            ["--shards", "SHARDS", "--out", "OUT", "--steps", "10", "--warmup-steps", "10"],
            "must be less than --steps 10",
        ),
        (["--shards", "SHARDS", "--out", "OUT", "--batch-size", "0"], "--batch-size: 0 is out of range"),
        (["--shards", "SHARDS", "--out", "OUT", "--device", "cuda"], "--device cuda: torch finds no CUDA device"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    places = {
        "SHARDS": shards,
        "OUT": tmp_path / "run",
        "EMPTY": tmp_path / "empty",
        "CUT": tmp_path / "cut",
        "FILE": tmp_path / "f",
    }
    places["EMPTY"].mkdir()
    places["FILE"].write_text("")
    if "CUT" in arguments:
        shutil.copytree(shards, places["CUT"])
        os.truncate(places["CUT"] / "shard-000001.tar", 30_000)
    done = train(*(places.get(a, a) for a in arguments))
    assert done.returncode == 2
    assert message in error_line(done)
    assert not list((tmp_path / "run").glob("*"))


def test_help_and_wrong_flags_answer_without_importing_torch():
    check = "import sys, oscar_train.__main__; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
    shown = train("--help")
    assert shown.returncode == 0
    for part in ("--batch-size", "--init", "Examples:", "Pre-train Oscar"):
        assert part in shown.stdout
    wrong = train("--weight-decai", "8")
    assert wrong.returncode == 2
    assert error_line(wrong) == "error: No such option '--weight-decai'. Did you mean '--weight-decay'?"
