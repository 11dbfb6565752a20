"""What cannot be meant is refused in one line, at once, and no file of the user's is lost."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from small_shards import make_samples, write_folder
from support import error_line, run_here

import oscar_extract.__main__
import oscar_shards.__main__
import oscar_train.__main__
import oscar_train.checkpoints.command
import oscar_train.evaluation.command
from oscar_common.errors import UsageError
from oscar_common.files import check_output_folder, replacing
from oscar_common.progress import plural

extract_command = oscar_extract.__main__.command
train_command = oscar_train.__main__.command
shards_command = oscar_shards.__main__.command
checkpoint_command = oscar_train.checkpoints.command.command
evaluate_command = oscar_train.evaluation.command.command


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("refusals") / "shards", make_samples(12))


def refused(command: click.Command, *arguments: object) -> str:
    """Run a command that must refuse its arguments, and return its one line."""
    done = run_here(command, *arguments)
    assert done.returncode == 2, done.stderr
    return error_line(done)


def outputs(shards: Path, folder: Path) -> list[tuple[click.Command, list[object]]]:
    """The commands that write one file, without the file."""
    captions = folder / "captions.tsv"
    captions.write_text("image\tcaption\n5.jpg\tOne.\n")
    return [
        (shards_command, ["show", shards, "--html"]),
        (shards_command, ["stats", shards, "--html"]),
        (shards_command, ["texts", shards, "--captions", captions, "--out"]),
        (evaluate_command, ["nowhere", "--json"]),
    ]


def test_a_file_of_the_users_is_never_overwritten_unasked(shards: Path, tmp_path: Path):
    precious = tmp_path / "precious.parquet"
    precious.write_text("image,caption\n")
    for command, line in outputs(shards, tmp_path):
        assert f"{line[-1]} {precious}: the file exists" in refused(command, *line, precious)
        assert precious.read_text() == "image,caption\n"


def test_a_command_replaces_its_own_file_and_with_overwrite_any(shards: Path, tmp_path: Path):
    for number, (command, line) in enumerate(outputs(shards, tmp_path)[:3]):
        out = tmp_path / f"{number}.parquet"
        out.write_text("mine")
        for flags in (["--overwrite"], []):
            done = run_here(command, *line, out, *flags)
            assert done.returncode == 0, done.stderr


def test_an_output_that_cannot_be_written_is_named_as_it_was_given(shards: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    for command, line in outputs(shards, tmp_path):
        for out in (tmp_path, tmp_path / "file" / "o.parquet"):
            said = refused(command, *line, out)
            assert f"{line[-1]} {out}: " in said
            assert ".tmp-" not in said


def test_an_error_names_the_file_and_not_its_temporary_name(tmp_path: Path):
    with pytest.raises(OSError, match="No such file") as error, replacing(tmp_path / "no" / "where"):
        pass
    assert error.value.filename == str(tmp_path / "no" / "where")


def test_output_is_never_mixed_with_the_users_files(shards: Path, tmp_path: Path):
    photos, tsv = tmp_path / "photos", tmp_path / "features.tsv"
    photos.mkdir()
    (photos / "a.jpg").touch()
    tsv.touch()
    for command, line in (
        (extract_command, ["--images", photos, "--out", photos]),
        (extract_command, ["--images", photos, "--captions", "txt", "--overwrite", "--out", tmp_path]),
        (train_command, ["--shards", shards, "--out", shards]),
        (train_command, ["--shards", shards, "--overwrite", "--out", photos]),
        (shards_command, ["import", "lxmert", tsv, "--out", photos]),
    ):
        before = sorted(line[-1].iterdir())
        said = refused(command, *line)
        assert f"--out {line[-1]}: the folder holds" in said, said
        assert sorted(line[-1].iterdir()) == before


def test_logs_and_hidden_files_are_in_no_outputs_way(tmp_path: Path):
    for name in (".gitignore", "slurm-17.out", "train.log"):
        (tmp_path / name).touch()
    check_output_folder(tmp_path, "--out", ("run.yaml",))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"the folder holds 'notes\.txt'"):
        check_output_folder(tmp_path, "--out", ("run.yaml",))
    (tmp_path / "run.yaml").touch()
    check_output_folder(tmp_path, "--out", ("run.yaml",))


def test_a_url_where_only_a_path_will_do_is_refused_by_name(shards: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = "s3://bucket/x"
    for flag, command, line in (
        ("--out", extract_command, ["--images", ".", "--out", url]),
        ("--captions", extract_command, ["--images", ".", "--out", "o", "--captions", url]),
        ("--exclude", extract_command, ["--images", ".", "--out", "o", "--exclude", "a", "--exclude", url]),
        ("--pipelines", extract_command, ["--pipelines", url]),
        ("--out", train_command, ["--shards", shards, "--out", url]),
        ("--cache", train_command, ["--shards", shards, "--out", "o", "--cache", url]),
        ("--resume", train_command, ["--resume", url]),
        ("--html", shards_command, ["show", shards, "--html", url]),
        ("--out", shards_command, ["export", "npz", shards, "--out", url]),
        ("PATH", shards_command, ["verify", url]),
        ("--json", evaluate_command, ["o", "--json", url]),
        ("FOLDER", checkpoint_command, ["show", url]),
        ("--out", checkpoint_command, ["export", "o", "--format", "hf", "--out", url]),
    ):
        assert refused(command, *line) == (
            f"error: {flag} {url}: a URL; give a path on this machine (a mounted bucket will do)"
        )
    assert not list(tmp_path.iterdir())


def test_an_output_in_a_file_of_settings_is_no_url_either(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text("pipelines: {mine: {extract: {images: ., out: 'gs://bucket/x'}}}")
    assert "--out gs://bucket/x: a URL" in refused(extract_command, "--pipelines", "p.yaml", "--pipeline", "mine")


def test_a_flag_given_twice_is_a_list_or_an_error(shards: Path, tmp_path: Path):
    for command, line, flag in (
        (extract_command, ["--images", "a", "--images", "b"], "--images"),
        (extract_command, ["--images", "a", "--captions", "a", "--captions", "b"], "--captions"),
        (train_command, ["--pipeline", "demo", "--pipeline", "demo"], "--pipeline"),
        (train_command, ["--compile", "--no-compile"], "--compile"),
        (shards_command, ["stats", shards, "--html", "a", "--html", "b"], "--html"),
        (evaluate_command, ["run", "--seed", "1", "--seed", "2"], "--seed"),
        (checkpoint_command, ["export", "run", "--out", "a", "--format", "hf", "--out", "b"], "--out"),
    ):
        with pytest.raises(UsageError) as error:
            command.main([str(word) for word in line], standalone_mode=False)
        assert error.value.message == f"{flag}: given 2 times; give it once"
    overlay = tmp_path / "o.parquet"
    captions = tmp_path / "c.tsv"
    captions.write_text("image\tcaption\n5.jpg\tOne.\n")
    twice = ["texts", shards, "--captions", captions, "--captions", captions, "--out", overlay]
    assert "2 texts for 1 of 12 images" in run_here(shards_command, *twice).stdout


def test_a_group_of_commands_without_arguments_prints_its_help():
    for command in (shards_command, checkpoint_command):
        done = run_here(command)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Examples:\n" in done.stdout


def test_a_file_is_not_called_a_missing_folder(shards: Path, tmp_path: Path):
    file = tmp_path / "photo.jpg"
    file.touch()
    for command, line in (
        (extract_command, ["--out", tmp_path / "o", "--images"]),
        (extract_command, ["--out", tmp_path / "o", "--dataset", "coco", "--root"]),
        (shards_command, ["show", shards, "--images"]),
        (train_command, ["--out", tmp_path / "o", "--shards"]),
        (train_command, ["--resume"]),
    ):
        assert f"{line[-1]} {file}: a file" in refused(command, *line, file)


def test_photos_that_are_in_another_folder_are_missed_aloud(shards: Path, tmp_path: Path):
    page, photos = tmp_path / "page.html", tmp_path / "photos"
    photos.mkdir()
    said = refused(shards_command, "show", shards, "--html", page, "--images", photos)
    assert f"--images {photos}: it has none of the 12 photos (the first is '0.jpg')" in said
    assert not page.exists()
    (photos / "1.jpg").touch()
    done = run_here(shards_command, "show", shards, "--html", page, "--images", photos)
    assert "12 images (11 without their photo)" in done.stdout


@pytest.mark.parametrize(
    ("content", "what"), [("", "empty"), ("# Settings of this run\n", "empty"), ("mix: []\n", "cut")]
)
def test_settings_that_were_lost_are_called_lost(tmp_path: Path, content: str, what: str):
    (tmp_path / "run.yaml").write_text(content)
    assert f"run.yaml is {what}: it names no shards" in refused(train_command, "--resume", tmp_path)
    if what == "empty":
        assert "run.yaml: the file is empty" in refused(train_command, "--recipe", tmp_path / "run.yaml")


def test_what_needs_no_torch_is_refused_before_it_is_loaded(shards: Path, tmp_path: Path):
    """In a process of its own, as here torch is there already; nobody runs the hub's server."""
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(f"shards: [{shards}]\n")
    (tmp_path / "run" / "checkpoint-000001").mkdir()
    lines = [
        ("oscar_train.evaluation.command", ["nope"], "FOLDER nope: no such folder"),
        ("oscar_train.evaluation.command", ["empty"], "neither a model nor a run"),
        ("oscar_train.evaluation.command", ["run"], f"or --shards {shards} --all to ask about those that it was"),
        ("oscar_train.evaluation.command", ["run", "--json", "no/x.json"], "--json no/x.json: no such folder"),
        ("oscar_train.checkpoints.command", ["show", "nope"], "FOLDER nope: no such folder"),
        ("oscar_train.checkpoints.command", ["export", "run", "--format", "hf", "--out", "file/x"], "file is a file"),
        ("oscar_train.__main__", ["--shards", shards, "--out", "file/x"], "--out file/x"),
        ("oscar_train.__main__", ["--shards", shards, "--out", "o", "--init", "empty"], "empty has no config.json"),
        (
            "oscar_train.__main__",
            ["--shards", shards, "--out", "o", "--init", "no-such/bert"],
            "not to be had from the",
        ),
        ("oscar_extract.__main__", ["--images", "empty", "--out", "file/x"], "--out file/x"),
    ]
    for module, words, message in lines:
        code = (
            f"import sys, {module} as module\nfrom oscar_common.cli import run\n"
            "try:\n    run(module.command, sys.argv[1:])\n"
            "finally:\n    assert 'torch' not in sys.modules"
        )
        environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path / "cache")}
        line = [sys.executable, "-c", code, *map(str, words)]
        done = subprocess.run(line, cwd=tmp_path, env=environment, text=True, capture_output=True)
        assert done.returncode == 2, done.stderr
        assert message in error_line(done)


def test_the_command_that_comes_next_is_one(shards: Path, tmp_path: Path):
    captions = tmp_path / "c.tsv"
    captions.write_text("image\tcaption\n5.jpg\tOne.\n")
    groups = {"oscar-shards": shards_command, "oscar-checkpoint": checkpoint_command}
    for line in (
        ["verify", shards],
        ["index", shards],
        ["stats", shards],
        ["show", shards, "--html", tmp_path / "a page.html"],
        ["texts", shards, "--captions", captions, "--out", tmp_path / "more texts.parquet"],
    ):
        said = run_here(shards_command, *line).stderr.splitlines()[-1]
        assert said.startswith("next: oscar-")
        name, *words = shlex.split(said.removeprefix("next: "))
        command = train_command if name == "oscar-train" else groups[name].commands[words.pop(0)]
        assert command.make_context(name, words).params


def test_a_count_has_its_noun():
    assert [plural(n, "image") for n in (0, 1, 1200)] == ["0 images", "1 image", "1,200 images"]
    assert plural(2, "index", "indexes") == "2 indexes"


def test_a_tag_is_found_in_any_case_and_an_unknown_one_says_how_many_there_are(shards: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    assert run_here(shards_command, "show", shards, "--html", page, "--tag", "Person").returncode == 0
    assert " more)" in refused(shards_command, "show", shards, "--html", page, "--tag", "zzz")


def test_help_shows_a_default_of_zero():
    assert "Steps of linear warm-up. [default: 0]" in " ".join(run_here(train_command, "--help").stdout.split())


def test_the_built_in_detector_has_one_preset(tmp_path: Path):
    (tmp_path / "a.jpg").touch()
    said = refused(extract_command, "--images", tmp_path, "--out", tmp_path / "o", "--preset", "bua")
    assert said.startswith("error: --preset bua: the built-in detector follows detectron2")


def test_sigterm_ends_a_command_with_a_word(tmp_path: Path):
    code = (
        "import os, signal, click, oscar_common.cli as cli\n"
        "command = click.Command('x', callback=lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "cli.run(command, [], continues=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == -signal.SIGTERM
    assert done.stderr == "error: stopped by SIGTERM; the same command again continues\n"
