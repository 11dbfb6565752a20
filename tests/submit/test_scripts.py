"""The scripts that sbatch gets, and what a pipeline is said to take."""

import json
import shutil
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import click
import pytest

from oscar_common.config import installed_catalog, load_catalog
from oscar_common.settings import Train
from oscar_submit.folder import JobRun, fingerprint, last_lines, runs_in
from oscar_submit.request import make_request
from oscar_submit.scripts import check_script, extract_script, flags, train_script
from oscar_submit.sizing import IMAGES, STEPS, measured_step
from oscar_train.__main__ import command as TRAIN

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def request_of(name: str = "coco", *changes: str):
    return make_request(installed_catalog(), name, changes=changes)


def scripts_of(*changes: str) -> list[str]:
    request = request_of("coco", *changes)
    assert request.extract is not None
    assert request.train is not None
    return [
        extract_script(request, request.extract, workers=4),
        check_script(request, request.extract),
        train_script(request, request.train),
    ]


def test_scripts_are_good_shell(tmp_path: Path):
    for script in scripts_of("train.wandb=it's here", "cluster.python=apptainer exec image.sif python"):
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert "{{" not in script


def test_all_of_a_cluster_comes_to_the_scripts():
    changes = ("cluster.account=vision", "cluster.extract.max_running=2", "cluster.options=--constraint=a100")
    extract, _, train = scripts_of(*changes, "cluster.setup=module load cuda", "cluster.train.nodes=2")
    for line in ("--account=vision", "--array=0-3%2", "--constraint=a100", "--gres=gpu:1", "--signal=B:USR1@120"):
        assert f"#SBATCH {line}\n" in extract
    for line in ("--nodes=2", "--ntasks-per-node=1", "--gres=gpu:8", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in train
    assert "\nmodule load cuda\n" in extract
    assert "--nnodes 2 --nproc-per-node 8" in train


def test_flags_give_back_the_settings():
    settings = Train(
        **{
            "shards": ["a b", "c"],
            "mix": [2.0, 0.5],
            "lr": 3e-5,
            "batch_size": 0,
            "compile": True,
            "init": "random:base",
            "out": "it's",
        }
    )
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {' '.join(flags(settings))}"], text=True, capture_output=True, check=True
    )
    with click.Context(TRAIN) as context:
        TRAIN.parse_args(context, words.stdout.split("\0")[:-1])
    for field in fields(Train):
        given, wanted = context.params[field.name], getattr(settings, field.name)
        if field.name == "batch_size":
            assert given == "auto"
        elif given not in (None, ()):
            assert (list(given) if isinstance(given, tuple) else given) == wanted


def test_a_fingerprint_follows_what_decides_and_not_the_cluster():
    one, other = request_of("coco", "cluster.extract.workers=3"), request_of("coco", "extract.max_boxes=36")
    assert fingerprint(one.extract) == fingerprint(request_of().extract)
    assert fingerprint(other.extract) != fingerprint(request_of().extract)


def test_rates_are_those_that_were_measured():
    for rate in IMAGES.values():
        measured = json.loads((RESULTS / rate.source).read_text())
        assert measured["images_per_second"]["all stages in one thread"] == rate.rate
    training = json.loads((RESULTS / "gpu-nvidia-h100.json").read_text())["training"]
    for step in STEPS:
        way = "ours-bf16-compile" if step.compile else "ours-bf16"
        _, median, _ = training[f"{step.model}, batch {step.batch}"][way]["samples_per_second"]
        assert step.rate.rate == median


def test_a_step_that_was_not_measured_has_no_time():
    base = Train(init="bert-base-uncased", precision="bf16", compile=True)
    assert measured_step(base, 96) == STEPS[1]
    assert measured_step(base, 300) == STEPS[2]
    assert measured_step(base, 1000) is None
    assert measured_step(replace(base, init="bert-large-uncased"), 96) is None
    assert measured_step(replace(base, precision="fp32"), 96) is None


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_notes_of_a_script_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A worker that is told to end, started again, and then fails."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text("pipelines: {p: {cluster: slurm, extract: {images: a, out: b}}}")
    fake = "cluster.python=bash -c 'echo at work; exit 3'"
    request = make_request(load_catalog(tmp_path / "p.yaml"), "p", changes=[fake])
    assert request.extract is not None

    environment = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURMD_NODENAME": "n1", "SLURM_RESTART_COUNT": "1"}
    script = extract_script(request, request.extract, workers=1)
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=environment)
    log = tmp_path / "extract-12_0.log"
    log.write_text(done.stdout)

    (run,) = runs_in(log)
    assert done.returncode == 3
    assert (run.job, run.node, run.restarts, run.code) == ("12", "n1", 1, 3)
    assert isinstance(run, JobRun)
    assert last_lines(log) == ["at work"]
