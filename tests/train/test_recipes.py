"""What settings come to: flags over a pipeline or a resumed run, over a recipe, over defaults."""

import dataclasses
import importlib
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support import error_line, run_here

from oscar_common.cli import settings_command
from oscar_common.config import installed_catalog
from oscar_common.errors import UsageError
from oscar_common.settings import Extract, Train
from oscar_train.arguments import check
from oscar_train.checkpoints.run_settings import resumed, write_settings


def resolve(*arguments: object) -> "Train | str":
    """The settings that the command would train with, or its one line of error."""
    found: list[Train] = []
    command = settings_command("train", Train, "", "", resumed)(lambda settings, catalog: found.append(settings))
    done = run_here(command, *arguments)
    assert done.returncode == (0 if found else 2)
    return found[0] if found else error_line(done)


@pytest.mark.parametrize(
    ("name", "objective", "init", "layernorm", "batch", "lr", "steps", "clip"),
    [
        ("oscar-base", "oscar", "bert-base-uncased", False, 768, 5e-5, 1_000_000, 10),
        ("oscar-large", "oscar", "bert-large-uncased", False, 512, 1e-5, 900_000, 10),
        ("oscar-plus-base", "oscar-plus", "bert-base-uncased", True, 1024, 1e-4, 1_000_000, 10),
        ("oscar-plus-large", "oscar-plus", "bert-large-uncased", True, 1024, 3e-5, 1_000_000, 10),
        ("visualbert", "visualbert", "bert-base-uncased", False, 48, 5e-5, 118_000, 1),
    ],
)
def test_the_recipes_are_the_papers(
    name: str, objective: str, init: str, layernorm: bool, batch: int, lr: float, steps: int, clip: float
):
    found = resolve("--recipe", name)
    assert (found.objective, found.init, found.image_layernorm) == (objective, init, layernorm)
    assert (found.batch_size, found.lr, found.steps, found.max_grad_norm) == (batch, lr, steps, clip)
    assert (found.weight_decay, found.schedule, found.variant) == (0.01, "linear", "paper")
    assert found.warmup_steps == (11_800 if name == "visualbert" else 0)
    assert set(installed_catalog().recipes) == {
        *("oscar-base", "oscar-large", "oscar-plus-base", "oscar-plus-large", "visualbert")
    }


def test_flags_win_over_a_pipeline_and_that_over_its_recipe(tmp_path: Path):
    (tmp_path / "p.yaml").write_text(
        "recipes:\n  mine: {lr: 7e-4, steps: 50, warmup_steps: 5, compile: true}\n"
        "pipelines:\n  a:\n    train: {recipe: mine, warmup_steps: 0, steps: 60, shards: s}\n"
    )
    found = resolve("--pipelines", tmp_path / "p.yaml", "--pipeline", "a", "--steps", 70, "--no-compile")
    assert (found.lr, found.warmup_steps, found.steps, found.shards) == (7e-4, 0, 70, ["s"])
    assert not found.compile
    other = tmp_path / "other.yaml"
    other.write_text("lr: 2e-4\nweight_decay: 0.5\n")
    found = resolve("--pipelines", tmp_path / "p.yaml", "--pipeline", "a", "--recipe", other)
    assert (found.lr, found.weight_decay, found.warmup_steps, found.compile) == (2e-4, 0.5, 0, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("warmup_step: 3", "unknown key 'warmup_step' (did you mean 'warmup_steps'?"),
        ("lr: fast", "lr: 'fast' is no number"),
        ("objective: oskar", "'oskar' is not allowed (did you mean 'oscar'?"),
        ("- a", "is no mapping of train settings"),
        ("recipe: oscar-base", "it names another recipe, 'oscar-base'; copy what it should have"),
        ("{", "not valid YAML"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_one_line(tmp_path: Path, content: str, message: str):
    (tmp_path / "r.yaml").write_text(content)
    said = resolve("--recipe", tmp_path / "r.yaml")
    assert said.startswith("error: ")
    assert message in said


def test_an_unknown_recipe_names_the_nearest():
    assert "--recipe oscar-bse: no such file, and no recipe of this name (did you mean 'oscar-base'?" in resolve(
        "--recipe", "oscar-bse"
    )


def test_a_run_folder_moved_with_its_shards_finds_them(tmp_path: Path):
    old = tmp_path / "old"
    for name in ("shards", "bert", "run"):
        (old / name).mkdir(parents=True)
    for name in ("more.parquet", "tags.txt"):
        (old / name).write_text("cat\n")
    settings = Train(
        shards=[str(old / "shards"), "s3://bucket/coco"],
        texts=[str(old / "more.parquet")],
        tag_vocabulary=str(old / "tags.txt"),
        init=str(old / "bert"),
        out=str(old / "run"),
        cache=str(tmp_path / "fast-disk"),
        lr=3e-5,
        recipe="oscar-base",
    )
    write_settings(old / "run", settings)
    (old / "tags.txt").unlink()  # it was copied
    new = Path(shutil.move(old, tmp_path / "new"))
    found = resolve("--resume", new / "run", "--read-threads", 3)
    assert found.shards == [str(new / "shards"), "s3://bucket/coco"]
    assert found.texts == [str(new / "more.parquet")]
    assert found.tag_vocabulary == str(new / "run" / "tag_vocabulary.txt")
    assert Path(found.tag_vocabulary).read_text() == "cat\n"
    assert (found.init, found.out, found.lr, found.recipe) == (str(new / "bert"), str(new / "run"), 3e-5, None)
    assert (found.read_threads, found.cache) == (3, None)
    (new / "run" / "checkpoint-000001").mkdir()  # from then on --init is but a name
    assert resolve("--resume", new / "run").init == str(old / "bert")
    again = resolve("--recipe", new / "run" / "run.yaml", "--out", "x")
    assert (again.lr, again.out) == (3e-5, "x")
    assert set(yaml.safe_load((new / "run" / "run.yaml").read_text())) == set(Train.__dataclass_fields__)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--resume", "EMPTY"), "no run.yaml there; give a folder that oscar-train wrote"),
        (("--resume", "no-such"), "--resume no-such: no such folder"),
        (("--resume", "EMPTY", "--recipe", "oscar-base"), "it cannot be given with --recipe"),
        (("--resume", "EMPTY", "--pipeline", "demo"), "it cannot be given with --pipeline"),
        (("--resume", "EMPTY", "--out", "x"), "it cannot be given with --out"),
        (("--resume", "EMPTY", "--overwrite"), "it cannot be given with --overwrite"),
    ],
)
def test_what_cannot_be_resumed_is_one_line(tmp_path: Path, flags: tuple[str, ...], message: str):
    assert message in resolve(*(tmp_path if flag == "EMPTY" else flag for flag in flags))


def test_every_setting_says_whether_a_run_depends_on_it_and_whether_it_is_a_path():
    for field in dataclasses.fields(Train):
        assert field.metadata["decides"] is not None, field.name
        if "str" in str(field.type) and not field.metadata["choices"]:
            assert field.metadata["path"] is not None, field.name


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--init", "run/checkpoint-000004"),
        ("--init", "link"),
        ("--recipe", "run/run.yaml"),
        ("--tag-vocabulary", "run/tag_vocabulary.txt"),
    ],
)
def test_overwrite_does_not_delete_what_a_run_begins_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, value: str
):
    monkeypatch.chdir(tmp_path)
    for place in ("run/checkpoint-000004", "run/checkpoint-best"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "link").symlink_to("run/checkpoint-000004")
    (tmp_path / "run" / "tag_vocabulary.txt").write_text("cat\n")
    write_settings(tmp_path / "run", Train(shards=["s3://bucket/coco"], out="run"))
    settings = resolve("--shards", "x", "--out", "run", "--overwrite", flag, value)
    assert isinstance(settings, Train)
    with pytest.raises(UsageError) as refused:
        check(settings)
    line = f"{flag} {value}: --overwrite deletes it from --out run; give a copy, or another --out"
    assert str(refused.value) == line

    check(replace(settings, out="elsewhere"))
    check(replace(settings, init="run/checkpoint-best", recipe=None, tag_vocabulary=None))  # which stays
    check(replace(settings, overwrite=False))


@pytest.mark.parametrize(("command", "schema"), [("oscar_train", Train), ("oscar_extract", Extract)])
def test_the_help_lists_every_option_once_under_its_group(command: str, schema: type):
    main = importlib.import_module(f"{command}.__main__")
    printed = run_here(main.command, "--help").stdout
    sections = dict(re.findall(r"^([A-Z]\w+):\n(.*?)(?=^\S|\Z)", printed, re.MULTILINE | re.DOTALL))
    for field in dataclasses.fields(schema):
        flag = re.compile(rf"^  --{field.name.replace('_', '-')}[ \n]", re.MULTILINE)
        assert [title for title, text in sections.items() if flag.search(text)] == [field.metadata["group"]], flag
