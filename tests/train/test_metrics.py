"""The logs of a run: which columns, which lines, what is cut where a run goes on, and what is sent elsewhere."""

import json
import math
import os
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_shards import make_samples, write_folder
from support import error_line, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oscar_common.errors import UsageError
from oscar_common.progress import duration
from oscar_common.settings import Train
from oscar_train.logs.log import COLUMNS, MEASURED, Row, open_log
from oscar_train.model.oscar import OscarForPreTraining, oscar_config, random_config
from oscar_train.training.reports import Forecast

NAMES = ("mlm_words", "answers")
WANDB = '''
"""A wandb that writes down what it is told."""
import json, pathlib
def note(*what):
    with pathlib.Path(__file__).with_name("said").open("a") as file:
        file.write(json.dumps(what) + "\\n")
class Run:
    def log(self, values, step): note("log", step, values)
    def finish(self, exit_code): note("finish", exit_code)
def init(**arguments):
    note("init", arguments)
    return Run()
'''


def row(step: int) -> Row:
    values = {name: step / 7 for name in COLUMNS if name not in ("step", "epoch")}
    return Row(step=step, epoch=step // 3, **values)


def lines(out: Path, name: str = "metrics.csv") -> list[str]:
    return (out / name).read_text().splitlines()


def points(out: Path, name: str) -> dict[int, float]:
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {e.step: e.value for e in events.Scalars(name)}


def test_logs_have_the_columns_promised_and_are_cut_where_a_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with open_log(tmp_path, 0, 10, 1) as log:
        for step in range(1, 7):
            log.add(row(step))
    whole = lines(tmp_path)
    assert whole[0] == (
        "step,epoch,loss,mlm_loss,match_loss,mlm_accuracy,match_accuracy,lr,grad_norm,skipped,skipped_steps,"
        "samples_per_second,tokens_per_second,of_ceiling,memory_gb,data_wait"
    )
    assert COLUMNS[-len(MEASURED) :] == MEASURED
    assert whole[3].startswith("3,1,0.428571429,")
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("7,2,0.99")  # a row cut by a kill
    time.sleep(1)  # TensorBoard orders files by the second in their names, then `.10` before `.9`
    with open_log(tmp_path, 4, 10, 1) as log:
        assert lines(tmp_path) == whole[:5]
        log.add(row(5))
    assert lines(tmp_path) == whole[:6]
    assert capsys.readouterr().err == ""
    assert list(points(tmp_path, "loss")) == [1, 2, 3, 4, 5]


def test_rows_that_somebody_cut_are_said_to_be_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with open_log(tmp_path, 0, 10, 2) as log:
        log.add(row(2))
    with open_log(tmp_path, 3, 10, 2):
        pass
    assert capsys.readouterr().err == ""
    with open_log(tmp_path, 6, 10, 2):
        pass
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/metrics.csv ends at step 2; the rows from there to step 6 are lost\n"
    )


@pytest.mark.parametrize("name", ["metrics.csv", "evaluation.csv"])
def test_a_table_with_other_columns_is_left_alone(tmp_path: Path, name: str):
    (tmp_path / name).write_text("time,value\n1,2\n")
    with (
        pytest.raises(UsageError, match=rf"{re.escape(name)} is not this command's: its columns are not step,"),
        open_log(tmp_path, 0, 10, 1, evaluation=NAMES),
    ):
        pass
    assert (tmp_path / name).read_text() == "time,value\n1,2\n"


def test_evaluations_have_a_file_of_their_own_and_nothing_where_there_was_nothing_to_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with open_log(tmp_path, 0, 10, 1, evaluation=NAMES) as log:
        assert log.evaluated == -1
        for step in (0, 2, 4):
            values = {"mlm_words": step + 1 / 3, "answers": math.nan if step == 2 else 0.5}
            log.add_evaluation(step, values, f"step {step}  held out: [words]")
        assert log.evaluated == 4
        log.settle()
    assert "step 2  held out: [words]\n" in capsys.readouterr().out
    assert lines(tmp_path, "evaluation.csv") == [
        "step,mlm_words,answers",
        "0,0.333333333,0.5",
        "2,2.33333333,",
        "4,4.33333333,0.5",
    ]
    assert points(tmp_path, "eval/mlm_words") == pytest.approx({0: 1 / 3, 2: 7 / 3, 4: 13 / 3})
    assert points(tmp_path, "eval/answers") == {0: 0.5, 4: 0.5}
    with open_log(tmp_path, 3, 10, 1, evaluation=NAMES) as log:
        assert log.evaluated == 2
    assert lines(tmp_path, "evaluation.csv")[-1] == "2,2.33333333,"
    with open_log(tmp_path, 3, 10, 1) as log:
        assert log.evaluated == -1
    assert len(lines(tmp_path, "evaluation.csv")) == 3


def test_a_line_shows_the_rounded_numbers_of_its_row_and_is_not_wide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shown = {
        **{"loss": 11.03451, "mlm_loss": 10.34132, "match_loss": 0.69321, "mlm_accuracy": 0.12345, "lr": 1.2345e-5},
        **{"match_accuracy": 0.51239, "samples_per_second": 12345.678, "tokens_per_second": 543210.9},
        **{"of_ceiling": 0.48123, "memory_gb": 75.1234, "data_wait": 0.0249},
    }
    rest = dict.fromkeys(("epoch", "grad_norm", "skipped", "skipped_steps"), 0)
    with open_log(tmp_path, 0, 1_000_000, 100) as log:
        for number in range(41):
            log.add(Row(step=990_000 + number, **shown, **rest))
    title, first, *others = capsys.readouterr().out.splitlines()
    assert title.split() == [*("loss", "mlm", "acc.", "match", "acc.", "lr", "samples/s", "memory", "wait", "ETA")]
    assert first.rpartition("  ")[0].split() == [
        *("step", "990000/1000000", "11.0345", "10.3413", "12.3%", "0.6932", "51.2%", "1.23e-05", "12345.7"),
        *("75.12", "GB", "2%"),
    ]
    assert others[39] == title
    assert all(len(line) <= 100 for line in (title, first, *others))
    assert first.index(" 12345.7") + 8 == title.index("samples/s") + 9


def test_the_time_left_follows_the_recent_pace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    now = 0.0
    monkeypatch.setattr("oscar_train.logs.log.time.monotonic", lambda: now)
    with open_log(tmp_path, 0, 1000, 1) as log:
        for step in range(1, 101):
            now += 60 if step == 1 else 10 if step <= 50 else 2
            log.add(row(step))
    left = [line.rpartition("  ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert left[:4] == ["-", "-", "-", "2:46:00"]  # not by the first step, which takes longer
    assert left[49] == "2:38:20"
    assert left[99] == "0:30:00"


def test_memory_does_not_grow_with_the_rows(tmp_path: Path):
    with open_log(tmp_path, 0, 100_000, 1, evaluation=NAMES) as log:

        def some(begin: int) -> int:
            for step in range(begin, begin + 300):
                log.add(row(step))
                log.add_evaluation(step, dict.fromkeys(NAMES, 0.5), "")
            log.settle()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            some(1)
            before = some(301)
            after = some(601)
        finally:
            tracemalloc.stop()
    assert after - before < 50_000


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module called wandb, which notes in `said` what it is told."""
    folder, real = tmp_path / "modules", {name for name in sys.modules if name.split(".")[0] == "wandb"}
    folder.mkdir()
    (folder / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(folder)
    for name in real:
        monkeypatch.delitem(sys.modules, name)
    yield folder
    sys.modules.pop("wandb", None)


def said(folder: Path) -> list[list[object]]:
    return [json.loads(line) for line in (folder / "said").read_text().splitlines()]


def test_weights_and_biases_gets_every_row_and_the_same_run_again(fake_wandb: Path, tmp_path: Path):
    options = {"evaluation": NAMES, "wandb": "project", "config": {"lr": 1e-4}}
    with open_log(tmp_path, 0, 10, 1, **options) as log:
        log.add(row(1))
        log.add_evaluation(1, {"mlm_words": 2.5, "answers": math.nan}, "")
    (_, arguments), *rows, finish = said(fake_wandb)
    identity = arguments["id"]
    assert re.fullmatch("[0-9a-f]{8}", identity)
    assert arguments == {
        "project": "project", "dir": str(tmp_path), "id": identity, "resume": "allow", "config": {"lr": 1e-4}
    }  # fmt: skip
    values = asdict(row(1))
    del values["step"]
    assert rows == [["log", 1, values], ["log", 1, {"eval/mlm_words": 2.5}]]
    assert finish == ["finish", 0]
    with pytest.raises(KeyboardInterrupt), open_log(tmp_path, 1, 10, 1, **options):
        raise KeyboardInterrupt
    (_, again), finish = said(fake_wandb)[-2:]
    assert again == arguments
    assert finish == ["finish", 1]


def test_a_wandb_that_cannot_begin_is_one_line(fake_wandb: Path, tmp_path: Path):
    (fake_wandb / "wandb.py").write_text('def init(**arguments):\n    raise ValueError("no key\\nmore")\n')
    with pytest.raises(UsageError) as error, open_log(tmp_path, 0, 10, 1, wandb="mine"):
        pass
    assert error.value.message == (
        "--wandb mine: cannot begin (no key); log in with `wandb login`, or set WANDB_MODE=offline"
    )


def test_a_missing_wandb_is_noticed_before_anything_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shards = write_folder(tmp_path / "shards", make_samples(4))
    arguments = ("--shards", shards, "--out", tmp_path / "run", "--wandb", "mine")
    monkeypatch.setattr("oscar_train.arguments.find_spec", lambda name: None)
    done = train(*arguments)
    assert done.returncode == 2
    assert error_line(done) == "error: --wandb mine: wandb is not installed; pip install wandb, or leave --wandb out"
    assert not (tmp_path / "run").exists()


def test_the_real_wandb_writes_to_the_run_folder(tmp_path: Path):
    pytest.importorskip("wandb", reason="needs pip install wandb")
    code = (
        "from pathlib import Path; from oscar_train.logs.log import open_log\n"
        "for step in (0, 1):\n"
        "    with open_log(Path('run'), step, 10, 5, evaluation=['a'], wandb='p', config={'lr': 1e-4}) as log:\n"
        "        log.add_evaluation(step + 1, {'a': 0.5}, '')"
    )
    (tmp_path / "run").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "WANDB_MODE": "offline"}, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower(), done.stderr
    identity = (tmp_path / "run" / "wandb" / "id").read_text()
    files = [*(tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")]
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    assert all(file.stat().st_size for file in files)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (1, "a second"),
        (100, "100 seconds"),
        (125, "2.1 minutes"),
        (4000, "67 minutes"),
        (3 * 86400, "3.0 days"),
        (1.23e8, "3.9 years"),
    ],
)
def test_a_long_time_is_said_in_a_unit_that_fits(seconds: float, words: str):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("pace", "told", "warned"), [(0.01, "", ""), (2, "take about 5.5 hours", ""), (123, "14 days", "14 days")]
)
def test_a_long_run_says_early_how_long_it_takes(
    pace: float, told: str, warned: str, capsys: pytest.CaptureFixture[str]
):
    said: list[str] = []
    train_state = SimpleNamespace(model=OscarForPreTraining(oscar_config(random_config("tiny", 100), 8)))
    settings = Train(steps=10_000, batch_size=768)
    forecast = Forecast(SimpleNamespace(settings=settings, train_state=train_state, log=said, say=said.append))
    for step in range(1, 40):
        forecast.add(step, 1000 + pace * step)
        if step == 2 and pace > 30:
            assert said  # a step that takes minutes is not waited for ten times
    assert len(said) == bool(told)
    assert told in "".join(said)
    warning = capsys.readouterr().err
    assert bool(warned) == ("--steps 10000, --batch-size 768: about" in warning)
