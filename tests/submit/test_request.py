"""clusters: and pipelines: of pipelines.yaml, and what the command line lays over them."""

from pathlib import Path

import pytest
from support import error_line, run_here

from oscar_common.config import installed_catalog, load_catalog
from oscar_common.errors import UsageError
from oscar_extract.summary import PAPER
from oscar_submit.__main__ import command as SUBMIT
from oscar_submit.request import make_request, seconds_of

SHIPPED = (
    *("demo", "coco", "cc", "sbu", "flickr30k", "gqa", "vqa", "vg-qa"),
    *("oscar-corpus", "oscar-plus-corpus"),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def request_of(text: str, *arguments: object, **keywords: object):
    Path("pipelines.yaml").write_text(text)
    return make_request(load_catalog(), *arguments, **keywords)


def test_these_pipelines_ship():
    assert tuple(installed_catalog().pipelines) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_pipeline_is_dry_run_without_its_data(folder: Path, name: str):
    if name == "demo":
        (folder / "runs/demo/images").mkdir(parents=True)
        (folder / "runs/demo/images/a.png").write_bytes(b"")
        (folder / "runs/demo/captions.json").write_text(
            '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a"}]}'
        )
    done = run_here(SUBMIT, name, "--dry-run", "--rate", "40")
    assert done.returncode == 0, done.stderr
    assert f"#SBATCH --array=0-{0 if name == 'demo' else 15}\n" in done.stdout  # no more workers than shards
    assert "-m torch.distributed.run" in done.stdout
    assert not list(folder.rglob("*.jobs"))


@pytest.mark.parametrize("name", PAPER)
def test_expected_counts_are_the_papers(name: str):
    expected = installed_catalog().pipelines[name].expected
    assert expected is not None
    assert (expected.images, expected.texts) == tuple(number(text) for text in PAPER[name].split(" / "))


def number(text: str) -> int:
    return round(float(text[:-1]) * {"k": 1e3, "M": 1e6}[text[-1]])


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        ("{a: {partitoin: gpu}}", "clusters.a: unknown key 'partitoin' (did you mean 'partition'?"),
        ("{a: {engine: slrum}}", "engine: 'slrum' is not allowed (did you mean 'slurm'?"),
        ("{a: {time: 12:00:00}}", "time: 43200 is no text; put it in quotes"),
        ("{a: {time: tomorrow}}", "time: 'tomorrow' is not a time like"),
        ("{a: {account: no}}", "account: False is no text; put it in quotes"),
        ("{a: {extract: {wokers: 3}}}", "clusters.a: extract: unknown key 'wokers' (did you mean 'workers'?"),
        ("{a: {extract: {workers: 0}}}", "workers: 0 is out of range; it must be at least 1"),
        ("{a: {extract: {memory: 32}}}", "memory: 32 is no text; put it in quotes"),
        ("{a: {extract: {memory: 32 GB}}}", "memory: '32 GB' is not a size like 32G"),
        ("{a: {train: {nodes: 5e-5}}}", "nodes: '5e-5' is no whole number"),
        ("{a: {setup: {}}}", "setup"),
    ],
)
def test_a_mistake_in_a_cluster_is_named_with_its_place(folder: Path, clusters: str, message: str):
    with pytest.raises(UsageError) as error:
        request_of(f"clusters: {clusters}\npipelines: {{}}\n", "demo")
    assert message in error.value.message
    assert "pipelines.yaml: clusters.a" in error.value.message
    assert "\n" not in error.value.message


MINE = """
clusters: {mine: {time: "1:00:00", partition: a, train: {nodes: 3, processes: 2}}}
pipelines:
  p:
    cluster: mine
    extract: {images: photos, out: shards}
    train: {shards: shards, out: run, batch_size: 12, lr: 5e-5}
"""


def test_set_and_flags_win_over_the_file(folder: Path):
    changes = (
        "train.lr=1e-4",
        "extract.dataset=a,b",
        "cluster.partition=b",
        "cluster.train.nodes=2",
        "cluster.time=2-0",
    )
    request = request_of(MINE, "p", changes=changes)
    assert request.train is not None
    assert request.extract is not None
    assert (request.train.lr, request.extract.dataset) == (1e-4, ["a,b"])
    assert (request.cluster.partition, request.cluster.train.nodes, request.cluster.time) == ("b", 2, "2-0")
    assert request.cluster.train.processes == 2

    done = run_here(
        SUBMIT, "submit", "p", "--stage", "train", "--set", "cluster.partition=b", "--partition", "c", "--dry-run"
    )
    assert "#SBATCH --partition=c" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("q",), "no pipeline 'q' in pipelines.yaml (known: p)"),
        (("coco",), "your file is an older one"),
        (("p", "--cluster", "mien"), "no cluster 'mien' (did you mean 'mine'?"),
        (("p", "--set", "train.lrr=1"), "unknown key 'lrr' (did you mean 'lr'?"),
        (("p", "--set", "cluster.train.node=1"), "unknown key 'node' (did you mean 'nodes'?"),
        (("p", "--set", "trian.lr=1"), "unknown key 'trian' (did you mean 'train'?"),
        (("p", "--set", "train.lr"), "not of the form"),
        (("p", "--set", "train.steps=many"), "'many' is no whole number"),
        (("p", "--set", "train.out=s3://b/run"), "a URL; give a path on this machine"),
        (("p", "--nodes", "5"), "train.batch_size 12: not a multiple of 10 ranks"),
        (("p", "--set", "train.overwrite=true"), "would start over"),
        (("p", "--set", "train.warmup_steps=1000"), "must be less than train.steps 1000"),
        (("p", "--time", "0:05:30"), "clusters.mine.time 0:05:30: a job would be asked to stop before it starts"),
        (("p", "--set", "cluster.train.time=6"), "clusters.mine.train.time 6: a job would be asked to stop"),
        (("p", "--set", "cluster.time=soon"), "'soon' is not a time like"),
    ],
)
def test_a_newcomers_mistake_is_one_line(folder: Path, arguments: tuple[str, ...], message: str):
    (folder / "pipelines.yaml").write_text(MINE)
    done = run_here(SUBMIT, *arguments, "--dry-run")
    assert done.returncode == 2
    assert message in error_line(done)


def test_a_stage_that_is_missing_is_named(folder: Path):
    (folder / "pipelines.yaml").write_text("pipelines: {p: {cluster: slurm, extract: {images: a, out: b}}}")
    done = run_here(SUBMIT, "p", "--stage", "train", "--dry-run")
    assert done.returncode == 2
    assert "pipeline 'p' has no key 'train'" in error_line(done)


def test_a_file_of_an_older_version_has_the_installed_clusters(folder: Path):
    request = request_of("clusters: {}\npipelines: {p: {extract: {images: a, out: b}}}", "p", cluster="slurm")
    assert request.cluster == installed_catalog().clusters["slurm"]


def test_without_sbatch_it_says_where_to_go(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / "pipelines.yaml").write_text(MINE)
    monkeypatch.setenv("PATH", str(folder))
    done = run_here(SUBMIT, "p")
    assert done.returncode == 2
    assert error_line(done).startswith("error: sbatch: not on the PATH")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 90 * 60),
        ("90:30", 90 * 60 + 30),
        ("1:30:00", 5400),
        ("2-3", 51 * 3600),
        ("2-03:30", 51.5 * 3600),
        ("1-00:00:05", 86405),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(time: str, seconds: float):
    assert seconds_of(time) == seconds
