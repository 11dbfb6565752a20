"""Both stages on a real SLURM, hit by all that a cluster does to jobs; what comes out is what undisturbed runs make."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from running import rows
from slurm_lab import (
    ask,
    cancel_all,
    end_time_limit_soon,
    kill_node,
    node_of,
    set_time_limit,
    signal_ranks,
    state_of,
    wait_until,
)
from support import contents, extract, photo, run_here

from oscar_submit.__main__ import command as SUBMIT
from oscar_submit.folder import read_record

pytestmark = pytest.mark.slurm

LONG = 30  # minutes
IMAGES, IMAGES_PER_SHARD = 120, 5
PIPELINES = """
datasets: {photos: {images: photos, captions: txt}}
clusters:
  lab:
    time: "30:00"
    warning_seconds: 20
    extract: {workers: 3, cpus: 3, memory: 1500M} # one on each node
    train: {nodes: 2, processes: 1, cpus: 1, memory: 1500M}
pipelines:
  disturbed:
    cluster: lab
    extract: {dataset: photos, out: shards, images_per_shard: 5, duplicates: keep, device: cpu}
    train: &train
      shards: shards
      out: disturbed
      init: random:tiny
      steps: 60
      batch_size: 8
      checkpoint_every: 5
      device: cpu
  undisturbed: {cluster: lab, train: {<<: *train, out: undisturbed}}
"""


@dataclass(frozen=True)
class Story:
    """What was seen on the way: answers of oscar-submit at some moments."""

    folder: Path
    submitted: str
    submitted_again: str
    at_work: dict
    in_training: dict
    after: dict
    after_exit: int
    again_after: str


def submit(*arguments: object):
    return run_here(SUBMIT, *arguments)


def look(name: str = "disturbed") -> dict:
    return json.loads(submit("status", name, "--json").stdout)


def make_photos(folder: Path) -> None:
    """Crops of four photos, each with a caption; large enough that all of them take a minute."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    pictures = [photo(name).resize((400, 300)) for name in ("astronaut", "coffee", "chelsea", "rocket")]
    for number in range(IMAGES):
        x, y = draw.integers(0, 80, 2)
        crop: Image.Image = pictures[number % 4].crop((x, y, x + 320, y + 220))
        crop.save(folder / f"{number:04d}.jpg", quality=90)
        (folder / f"{number:04d}.txt").write_text(f"a picture, the {number}th of many\n")


@pytest.fixture(scope="module")
def story(slurm: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("cluster")
    make_photos(folder / "photos")
    (folder / "pipelines.yaml").write_text(PIPELINES)
    before = Path.cwd()
    os.chdir(folder)
    try:
        return tell(slurm, folder)
    finally:
        os.chdir(before)
        cancel_all()


def tell(slurm: ModuleType, folder: Path) -> Story:
    submitted = submit("disturbed")
    assert submitted.returncode == 0, submitted.stderr
    array = read_record(folder / "shards")["submissions"][0]["jobs"]["extract"]
    training = read_record(folder / "disturbed")["submissions"][0]["jobs"]["train"]
    submitted_again = submit("disturbed").stdout

    wait_until(lambda: look()["extraction"]["done"] >= 2, "the first shards")
    at_work = look()
    disturb_workers(slurm, array)
    wait_until(lambda: state_of(training) == "RUNNING", "training")

    assert submit("undisturbed", "--stage", "train").returncode == 0
    wait_until(lambda: last_step(folder / "disturbed") >= 3, "the first steps")
    in_training = look()
    disturb_training(folder, training)
    wait_until(lambda: not look()["at_work"] and not look("undisturbed")["at_work"], "the end of training")

    after = submit("status", "disturbed", "--json", "--html", "status.html")
    return Story(
        folder=folder,
        submitted=submitted.stdout,
        submitted_again=submitted_again,
        at_work=at_work,
        in_training=in_training,
        after=json.loads(after.stdout),
        after_exit=after.returncode,
        again_after=submit("disturbed").stdout,
    )


def disturb_workers(slurm: ModuleType, array: str) -> None:
    """Cancel one worker for good, take the time from another, requeue, preempt and kill the third."""
    elements = [f"{array}_{number}" for number in range(3)]
    ask("scancel", elements[0])
    end_time_limit_soon(elements[1])
    ask("scontrol", "requeue", elements[2])
    wait_until(lambda: state_of(elements[2]) == "RUNNING", "the requeued worker")

    node = node_of(elements[2])
    urgent = ["--partition=urgent", f"--nodelist={node}", "--exclusive", "--output=/dev/null"]
    job = ask("sbatch", "--parsable", *urgent, "--wrap", "sleep 1").strip()
    wait_until(lambda: not state_of(job), "the urgent job's end")
    wait_until(lambda: state_of(elements[2]) == "RUNNING", "the preempted worker")

    node = node_of(elements[2])
    kill_node(Path(os.environ["SLURM_CONF"]).parent, node)
    wait_until(lambda: state_of(elements[2]) == "RUNNING" and node_of(elements[2]) != node, "the worker elsewhere")
    wait_until(lambda: state_of(elements[1]) != "RUNNING" or restarts(elements[1]) > 0, "the time limit's warning")
    set_time_limit(elements[1], LONG)
    slurm.start_node(node)  # with which SLURM takes it for up again


def disturb_training(folder: Path, job: str) -> None:
    """Take the time from a training, and when it runs again, requeue it."""
    log = folder / "disturbed.jobs" / "logs" / f"train-{job}.log"
    signal_ranks(job, signal.SIGSTOP)  # so that a fast machine is not done before the warning comes
    end_time_limit_soon(job)
    wait_until(lambda: "CANCELLED AT" in log.read_text(), "the time limit's warning")
    signal_ranks(job, signal.SIGCONT)
    wait_until(lambda: state_of(job) == "PENDING", "the job in the queue again")
    set_time_limit(job, LONG)
    stopped_at = last_step(folder / "disturbed")
    wait_until(lambda: last_step(folder / "disturbed") > stopped_at + 3, "steps after the time limit")
    ask("scontrol", "requeue", job)


def restarts(job: str) -> int:
    """How often a job has begun again."""
    return int(ask("scontrol", "--oneliner", "show", "job", job).partition("Restarts=")[2].split()[0])


def last_step(out: Path) -> int:
    """The last step in metrics.csv."""
    path = out / "metrics.csv"
    return int(rows(out)[-1]["step"]) if path.exists() and rows(out) else 0


def test_it_says_what_it_submits(story: Story):
    assert "3 workers for 24 shards" in story.submitted
    assert "check: job" in story.submitted
    assert "training: job" in story.submitted


def test_submitted_twice_nothing_is_added(story: Story):
    assert story.submitted_again.count("nothing to submit") >= 3
    assert len(read_record(story.folder / "shards")["submissions"]) == 1


def test_status_at_work_says_who_does_what(story: Story):
    extraction = story.at_work["extraction"]
    assert story.at_work["at_work"]
    assert extraction["done"] + len(extraction["in_work"]) + extraction["left"] == 24
    assert extraction["jobs"]


def test_status_in_training_has_its_numbers(story: Story):
    training = story.in_training["training"]
    assert story.in_training["extraction"]["complete"]
    assert training["step"] >= 3
    assert {"loss", "mlm_loss", "match_loss", "samples_per_second"} <= set(training["numbers"])
    assert training["eta"] > 0


def test_workers_that_come_and_go_write_the_bytes_of_one_process(story: Story, tmp_path: Path):
    assert story.after["extraction"]["complete"]
    flags = ["--images", story.folder / "photos", "--captions", "txt", "--images-per-shard", IMAGES_PER_SHARD]
    flags += ["--duplicates", "keep", "--device", "cpu", "--workers", 1]
    alone = extract(*flags, "--source", "photos", "--out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    assert shards(story.folder / "shards") == shards(tmp_path / "alone")


def shards(folder: Path) -> dict[str, bytes]:
    """The tars and indexes of a folder."""
    return {name: content for name, content in contents(folder).items() if name.startswith("shard-")}


def test_a_training_that_is_stopped_twice_has_the_curve_of_one_that_is_not(story: Story):
    disturbed, undisturbed = rows(story.folder / "disturbed"), rows(story.folder / "undisturbed")
    assert len(disturbed) == 60
    assert disturbed == undisturbed


def test_the_record_says_where_and_when_and_how_often(story: Story):
    record = read_record(story.folder / "shards")
    assert record["counts"]["complete"]
    assert record["counts"]["images_done"] == IMAGES
    workers = [run for run in record["runs"] if run["log"].startswith("extract-")]
    assert {run["node"] for run in workers} <= {"n1", "n2", "n3"}
    assert max(run["restarts"] for run in workers) >= 3  # requeued, preempted, its node killed

    trained = read_record(story.folder / "disturbed")
    assert trained["counts"] == {"step": 60}
    assert [run["restarts"] for run in trained["runs"]] == [0, 1, 2]


def test_once_complete_status_is_content_and_nothing_is_submitted(story: Story):
    assert story.after_exit == 0
    assert story.after["complete"]
    assert "nothing to submit" in story.again_after
    page = (story.folder / "status.html").read_text()
    assert "<polyline" in page
    assert "http" not in page
