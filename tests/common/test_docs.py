"""Every command line in the docs is one that the commands take, and every link leads somewhere."""

import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import pytest
import yaml
from support import EXTRACT, SHARDS, TRAIN

import oscar_common
import oscar_submit.__main__
import oscar_train.checkpoints.command
import oscar_train.evaluation.command
import oscar_train.predict_command
import oscar_train.tasks.finetune

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS: dict[str, click.Command] = {
    "oscar-checkpoint": oscar_train.checkpoints.command.command,
    "oscar-evaluate": oscar_train.evaluation.command.command,
    "oscar-extract": EXTRACT,
    "oscar-finetune": oscar_train.tasks.finetune.command,
    "oscar-predict": oscar_train.predict_command.command,
    "oscar-shards": SHARDS,
    "oscar-submit": oscar_submit.__main__.command,
    "oscar-train": TRAIN,
}
FENCE = re.MULTILINE | re.DOTALL
TORCHRUN = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--signals-to-handle"}
SYNOPSIS = re.compile(
    r"\.\.\.$|[][|]|^[A-Z]{2,}$"
)  # in words that stand for others: ..., [--overwrite], oscar|hf, FORMAT


def code_of(page: str) -> str:
    """The lines of a page that are code: those of fenced blocks of a shell, and those set in by four spaces."""
    fenced = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", page, FENCE)
    prose = re.sub(r"^```.*?^```", "", page, flags=FENCE)
    lines = [line[4:] for line in prose.splitlines() if line.startswith("    ")]
    return "\n".join([*fenced, *lines])


def words_of(line: str) -> list[str]:
    """The words of a command line of this project, without the command's folder and torchrun; none of another line."""
    if not re.match(r"(\$ )?(\.venv/bin/)?(oscar-[a-z]+|torchrun) ", line):
        return []
    words = shlex.split(line.removeprefix("$ ").removesuffix("&"), comments=True)
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    return [Path(words[0]).name.replace("_", "-"), *words[1:]]


def commands_of(page: str) -> list[list[str]]:
    """The command lines of this project in a page's code."""
    lines = code_of(page).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := words_of(line))]


def find_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command or subcommand that a line calls, and its arguments."""
    command, arguments = COMMANDS[words[0]], words[1:]
    if words[0] == "oscar-submit" and arguments[0] not in command.commands:
        arguments = ["submit", *arguments]
    if words[0] == "oscar-finetune" and re.fullmatch(r"TASK|[a-z2]+(\|[a-z2]+)+", arguments[0]):  # any of the tasks
        arguments = ["retrieval", *arguments[1:]]
    if isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        return command.commands[arguments[0]], arguments[1:]
    return command, arguments


def check_flags(words: list[str]) -> None:
    """Fail if a command line has a flag that its command has not."""
    command, arguments = find_command(words)
    known = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)} | {"--help"}
    flags = {word.strip("[]").partition("=")[0] for word in arguments if word.strip("[]").startswith("--")}
    assert flags <= known, f"no option {', '.join(flags - known)}"


def check_line(words: list[str]) -> None:
    """Have click parse a command line, which it refuses with an exception; nothing is run.

    Of a line that stands for several, only the flags are looked at.
    """
    command, arguments = find_command(words)
    if not any(SYNOPSIS.search(word) for word in arguments):
        command.make_context(words[0], [*arguments])
    check_flags(words)


def check(page: str, check_one: Callable[[list[str]], None], lines: Iterable[list[str]]) -> None:
    for words in lines:
        try:
            check_one(words)
        except (click.ClickException, AssertionError, KeyError) as error:
            pytest.fail(f"{page}: {shlex.join(words)}: {error}")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_line_is_one_that_the_command_takes(path: Path):
    check(path.name, check_line, commands_of(path.read_text()))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_in_a_sentence_has_its_flags(path: Path):
    spans = re.findall(r"`(oscar-[a-z]+ [^`]*)`", re.sub(r"^```.*?^```", "", path.read_text(), flags=FENCE))
    check(path.name, check_flags, [words_of(" ".join(span.split())) for span in spans])


def test_every_example_of_the_help_is_one_that_the_command_takes():
    groups = [command for command in COMMANDS.values() if isinstance(command, click.Group)]
    commands = [*COMMANDS.values(), *(c for group in groups for c in group.commands.values())]
    lines = [line.strip() for command in commands for line in (command.epilog or "").splitlines()]
    examples = [words for line in lines if (words := words_of(line))]
    assert len(examples) > 40
    check("--help", check_line, examples)


def test_command_lines_are_looked_for_where_they_are():
    found = [words for path in PAGES for words in commands_of(path.read_text())]
    assert len(found) > 25
    assert {words[0] for words in found} == {*COMMANDS}
    with pytest.raises(click.NoSuchOption):
        check_line(["oscar-train", "--shards", "shards", "--out", "run", "--stesp", "3"])
    with pytest.raises(AssertionError, match="--formt"):
        check_line(["oscar-checkpoint", "export", "FOLDER", "--formt", "oscar|hf"])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_flag_that_a_sentence_names_is_one_of_a_command(path: Path):
    subcommands = [c for group in COMMANDS.values() if isinstance(group, click.Group) for c in group.commands.values()]
    options = (o for c in [*COMMANDS.values(), *subcommands] for p in c.params for o in (*p.opts, *p.secondary_opts))
    known = {*options, *TORCHRUN, "--help", "--version"}
    spans = re.findall(r"`(--[^`]*)`", path.read_text())
    flags = {flag for span in spans for flag in re.findall(r"--[\w-]+", span)}
    named = {flag for flag in flags if "_" not in flag}  # microsoft/Oscar's have a _
    assert named <= known, f"{path.name}: no command has {sorted(named - known)}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_a_heading(path: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{path.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{path.name}: {target}"


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == oscar_common.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    arxiv = [reference["identifiers"][0]["value"] for reference in citation["references"]]
    assert arxiv == ["arXiv:2004.06165", "arXiv:2101.00529"]
