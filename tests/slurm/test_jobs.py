"""What SLURM itself refuses, jobs that cannot begin, and jobs that are cancelled."""

import shutil
from pathlib import Path
from types import ModuleType

import pytest
from slurm_lab import ask, queue, state_of, wait_until
from support import error_line, photo, run_here

from oscar_submit.__main__ import command as SUBMIT
from oscar_submit.folder import read_record

pytestmark = pytest.mark.slurm

PIPELINES = """
clusters: {lab: {time: "10:00", extract: {workers: 1, cpus: 1, memory: 1500M}, train: {memory: 2G}}}
pipelines:
  one:
    cluster: lab
    extract: {images: photos, out: shards, device: cpu}
    train: {shards: shards, out: run, steps: 2, batch_size: 2, device: cpu}
"""


@pytest.fixture
def folder(slurm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a photo and a pipeline, to work in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    photo("coffee").resize((300, 200)).save(tmp_path / "photos" / "coffee.jpg")
    (tmp_path / "pipelines.yaml").write_text(PIPELINES)
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (("--partition", "gpux"), ("invalid partition", "change clusters.lab: partition")),
        (
            ("--set", "cluster.extract.gpus=1", "--set", "cluster.options=--gres=gpu:9"),
            ("clusters.lab: extract and train",),
        ),
        (("--set", "cluster.extract.memory=900G"), ("clusters.lab: extract and train: gpus, cpus, memory, nodes",)),
        (("--set", "cluster.options=--quack=1"), ("change clusters.lab: options",)),
        (("--workers", "2000"), ("at most 1,000 elements", "give --workers 1000")),
        (("--set", "extract.images=nowhere"), ("--images nowhere: no such folder",)),
    ],
)
def test_what_is_refused_is_one_line_with_the_key_to_change(
    folder: Path, flags: tuple[str, ...], messages: tuple[str, ...]
):
    done = run_here(SUBMIT, "one", *flags)
    assert done.returncode == 2
    line = error_line(done)
    assert all(message in line for message in messages), line
    assert not queue()


def test_a_chain_that_is_refused_in_the_middle_leaves_no_job(folder: Path):
    done = run_here(SUBMIT, "one", "--set", "cluster.train.memory=900G")
    assert done.returncode == 2
    assert "train.sh" in error_line(done)
    assert not queue()


def test_jobs_that_wait_are_cancelled_and_can_be_submitted_again(folder: Path):
    ask("scontrol", "update", "PartitionName=cpu", "State=DOWN")
    try:
        assert run_here(SUBMIT, "one").returncode == 0
        waiting = run_here(SUBMIT, "status", "one")
        cancelled = run_here(SUBMIT, "cancel", "one")
    finally:
        ask("scontrol", "update", "PartitionName=cpu", "State=UP")

    assert waiting.returncode == 0
    assert "waits: PartitionDown" in waiting.stdout
    assert cancelled.stdout.count("out of the queue") == 1
    assert "stays: 0 of 1 shard in shards" in cancelled.stdout
    assert not queue()

    after = run_here(SUBMIT, "status", "one")
    assert after.returncode == 1
    assert "no job of it waits or runs" in error_line(after)


def test_an_output_that_the_nodes_do_not_see_is_named_by_status(folder: Path):
    """The folder for logs goes before the job begins, as if it were on a disk of the login node alone."""
    ask("scontrol", "update", "PartitionName=cpu", "State=DOWN")
    try:
        assert run_here(SUBMIT, "one", "--stage", "extract").returncode == 0
        jobs = read_record(folder / "shards")["submissions"][0]["jobs"]
        shutil.rmtree(folder / "shards.jobs" / "logs")
        (folder / "shards.jobs" / "logs").write_text("a file, so that no log can be written there")
    finally:
        ask("scontrol", "update", "PartitionName=cpu", "State=UP")

    wait_until(lambda: not any(state_of(job) for job in jobs.values()), "the end of the jobs")
    done = run_here(SUBMIT, "status", "one", "--stage", "extract")
    assert done.returncode == 1
    assert f"its node cannot write {folder}/shards.jobs" in done.stdout


def test_a_worker_that_fails_is_shown_with_its_last_words(folder: Path):
    done = run_here(SUBMIT, "one", "--stage", "extract", "--set", f"cluster.python={folder}/no-python")
    assert done.returncode == 0, done.stderr
    jobs = read_record(folder / "shards")["submissions"][0]["jobs"]
    wait_until(lambda: not any(state_of(job) for job in jobs.values()), "the end of the jobs")

    done = run_here(SUBMIT, "status", "one", "--stage", "extract")
    assert done.returncode == 1
    assert f"job {jobs['extract']}_0 ended with exit code 127" in done.stdout
    assert "no-python: No such file or directory" in done.stdout


def test_a_running_job_is_told_to_save_its_work_and_takes_the_time_that_it_needs(folder: Path):
    """In the place of a worker, something that takes longer to end than SLURM's KillWait would give it."""
    worker = folder / "worker"
    worker.write_text("#!/bin/bash\ntrap 'sleep 8; echo saved; exit 143' TERM\necho at work\nsleep 300 & wait\n")
    worker.chmod(0o755)
    assert run_here(SUBMIT, "one", "--set", f"cluster.python={worker}").returncode == 0
    job = read_record(folder / "shards")["submissions"][0]["jobs"]["extract"]
    log = folder / "shards.jobs" / "logs" / f"extract-{job}_0.log"
    wait_until(lambda: log.exists() and "at work" in log.read_text(), "the worker's beginning")

    cancelled = run_here(SUBMIT, "cancel", "one")
    assert "asked to save and stop: " in cancelled.stdout
    wait_until(lambda: not queue(), "an empty queue")
    assert "saved\noscar-submit: ended 143" in log.read_text()
    assert log.read_text().count("oscar-submit: began") == 1


def test_status_goes_by_the_folder_where_there_is_no_squeue(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(folder))
    done = run_here(SUBMIT, "status", "one")
    assert done.returncode == 0
    assert "the queue is not known: squeue: not on the PATH" in done.stdout
    assert "extraction: not planned yet" in done.stdout
