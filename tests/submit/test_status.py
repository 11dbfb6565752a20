"""What status says where no SLURM answers: all from folders."""

import json
from pathlib import Path

import pytest
from PIL import Image
from support import error_line, extract, run_here

from oscar_common.config import load_catalog
from oscar_submit.__main__ import command as SUBMIT
from oscar_submit.folder import add_submission, fingerprint, job_name, jobs_folder, log_folder, read_record
from oscar_submit.request import make_request, output

PIPELINES = """
pipelines:
  p:
    cluster: slurm
    extract: {images: photos, out: shards, images_per_shard: 2}
    train: {shards: shards, out: run, steps: 100, batch_size: 4}
"""
LOG = """\
oscar-submit: began 2026-11-27T10:00:00+00:00 job 7 node n1 restarts 0
at work
oscar-submit: ended 143 2026-11-27T10:00:30+00:00 job 7 node n1 restarts 0
oscar-submit: began 2026-11-27T10:01:00+00:00 job 7 node n2 restarts 1
error: the disk is full
oscar-submit: ended 1 2026-11-27T10:01:30+00:00 job 7 node n2 restarts 1
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a planned pipeline that was submitted as jobs 7 and 8, to work in; there is no squeue."""
    (tmp_path / "photos").mkdir()
    for number in range(5):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "pipelines.yaml").write_text(PIPELINES)
    monkeypatch.chdir(tmp_path)
    assert extract("--images", "photos", "--out", "shards", "--images-per-shard", 2, "--plan-only").returncode == 0

    request = make_request(load_catalog(), "p")
    assert request.extract is not None
    add_submission(request, request.extract, {"extract": "7", "check": "8"})
    log_folder(output(request.extract)).mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def look(*flags: object) -> dict:
    return json.loads(run_here(SUBMIT, "status", "p", "--json", *flags).stdout)


def test_the_plan_is_counted_and_the_queue_is_said_to_be_unknown(folder: Path):
    status = look()
    assert not status["complete"]
    assert status["queue"].startswith("squeue: not on the PATH")
    assert {name: status["extraction"][name] for name in ("shards", "done", "left", "images")} == {
        "shards": 3,
        "done": 0,
        "left": 3,
        "images": 5,
    }


def test_a_job_that_failed_is_shown_by_the_end_of_its_log(folder: Path):
    (folder / "shards.jobs" / "logs" / "extract-7_0.log").write_text(LOG)
    (folder / "shards.jobs" / "logs" / "extract-6_0.log").write_text(LOG)  # of an earlier submission
    (failure,) = look()["extraction"]["failures"]
    assert failure["reason"] == "ended with exit code 1"
    assert failure["lines"] == ["at work", "error: the disk is full"]


def test_a_job_that_was_told_to_end_is_no_failure_and_a_killed_one_is(folder: Path):
    log = folder / "shards.jobs" / "logs" / "extract-7_0.log"
    log.write_text("".join(LOG.splitlines(keepends=True)[:3]))
    assert look()["extraction"]["failures"] == []
    log.write_text("".join(LOG.splitlines(keepends=True)[:2]))
    assert look()["extraction"]["failures"][0]["reason"] == "was killed on n1, or its node failed"


def test_a_training_is_followed_by_its_metrics(folder: Path):
    (folder / "run").mkdir()
    (folder / "run" / "metrics.csv").write_text(
        "step,loss,mlm_loss,match_loss,samples_per_second\n1,9,8,1,10\n2,8.5,7.5,1,20\n3,8"  # a row in the making
    )
    training = look()["training"]
    assert (training["step"], training["steps"], training["checkpoint"]) == (2, 100, 0)
    assert training["numbers"] == {"loss": 8.5, "mlm_loss": 7.5, "match_loss": 1, "samples_per_second": 20}


def test_the_page_needs_no_other_file_and_replaces_only_its_own(folder: Path):
    (folder / "mine.html").write_text("my own")
    done = run_here(SUBMIT, "status", "p", "--html", "mine.html")
    assert done.returncode == 2
    assert "this command did not write it" in error_line(done)

    for _ in range(2):
        assert run_here(SUBMIT, "status", "p", "--html", "page.html").returncode == 0
    page = (folder / "page.html").read_text()
    assert "3 left" in page
    assert "src=" not in page
    assert "http" not in page


def test_the_record_keeps_submissions_of_the_same_settings_alone(folder: Path):
    request = make_request(load_catalog(), "p")
    other = make_request(load_catalog(), "p", changes=["extract.max_boxes=20"])
    assert request.extract is not None
    assert other.extract is not None

    add_submission(request, request.extract, {"extract": "9"})
    record = read_record(folder / "shards")
    assert [submission["jobs"] for submission in record["submissions"]] == [
        {"extract": "7", "check": "8"},
        {"extract": "9"},
    ]
    assert record["fingerprint"] == fingerprint(request.extract)
    assert job_name(request, "extract", request.extract).endswith(record["fingerprint"])
    assert record["settings"]["images"] == "photos"
    assert record["versions"]["torch"]

    add_submission(other, other.extract, {"extract": "10"})
    assert len(read_record(folder / "shards")["submissions"]) == 1


def test_a_damaged_record_is_named(folder: Path):
    (jobs_folder(folder / "shards") / "record.json").write_text("{")
    done = run_here(SUBMIT, "status", "p")
    assert done.returncode == 2
    assert "record.json: damaged; remove it" in error_line(done)
