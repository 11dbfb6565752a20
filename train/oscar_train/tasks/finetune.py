"""oscar-finetune: from a pre-trained Oscar and shards to a model for a task."""

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType

import click

from oscar_common import __version__
from oscar_common.cli import Group, run, settings_command
from oscar_common.memory import lacks_memory
from oscar_common.progress import say_next
from oscar_common.settings import Catalog, Finetune
from oscar_train.arguments import FEW_SHAPES, check
from oscar_train.checkpoints.run_settings import resumed
from oscar_train.training.signals import Stop, watched_signals

HELP = """Fine-tune a pre-trained Oscar for a task, on shards made by oscar-extract.

The same command again, or --resume OUT, continues from the newest checkpoint, to the same numbers as a run that was
never stopped. docs/tasks.md has each task's recipe, and what the papers reached with it.
"""
NOT_OF_TASKS = ("objective", "variant", "negatives", "whole_word_masking")
OF_ANSWERS = ("annotations", "min_answers")
OF_CAPTIONS = ("label_smoothing", "self_critical")
OF_ROWS = ("text_length", "attention")  # which captions have of their own
RETRIEVAL = """Train a model to tell whether a caption belongs to an image.

Each caption makes two rows: with its own image, and with a wrong image and its tags, or a wrong caption beside its
image. Held-out images are found by their captions, and captions by their images (R@1, 5, 10), while training with
--eval-fraction or --eval-shards, later with oscar-evaluate. oscar-predict search uses the model.
"""
VQA = """Train a model to answer questions about images.

Questions are those of the shards (oscar-extract --dataset vqa, or oscar-shards texts). Classes are the answers that
most people gave to at least --min-answers questions, compared as VQA's evaluation does. With --annotations the targets
are what all ten people answered, else the shards' one answer. oscar-predict answer uses the model.
"""
GQA = """Train a model to answer GQA's questions: one answer each, all answers are classes.

Questions are those of the shards (oscar-extract --dataset gqa, or oscar-shards texts). oscar-predict answer uses the
model.
"""
NLVR2 = """Train a model to tell whether a statement is true of two images.

Statements are questions of the shards' left images, whose keys end in -img0, with the answer True or False; the right
image is the one whose key ends in -img1.
"""
CAPTION = """Train a model to write captions.

Up to three tokens of each caption are masked; what a token sees of the caption are the tokens before it, so that the
model can write word by word. Captions of held-out images are written and scored (BLEU-4, CIDEr-D, ROUGE-L) while
training with --eval-fraction or --eval-shards. Then --self-critical, with --init of that run, trains on CIDEr-D itself.
oscar-predict caption uses the model.
"""
EXAMPLES = MappingProxyType(
    {
        "vqa": """  oscar-finetune vqa --init run --shards vqa-shards --out vqa --eval-fraction 0.1
  oscar-finetune vqa --recipe vqa-base --init oscar-base --shards vqa-shards --annotations train.json --out vqa
""",
        "nlvr2": """  oscar-finetune nlvr2 --recipe nlvr2-base --init oscar-base --shards nlvr2-shards --out nlvr2
""",
        "gqa": """  oscar-finetune gqa --init run --shards gqa-shards --out gqa --eval-fraction 0.1
  oscar-finetune gqa --recipe gqa-base --init oscar-base --shards gqa-shards --out gqa
""",
        "retrieval": """  oscar-finetune retrieval --init run --shards shards --out search --eval-fraction 0.1
  oscar-finetune retrieval --recipe retrieval-base --init oscar-base --shards coco-shards --out search
  oscar-finetune retrieval --resume search
""",
        "caption": """  oscar-finetune caption --init run --shards shards --out captions --eval-fraction 0.1
  oscar-finetune caption --recipe caption-base --init oscar-base --shards coco-shards --out captions
  oscar-finetune caption --recipe caption-cider-base --init captions --shards coco-shards --out better
  oscar-finetune caption --resume captions
""",
    }
)


@click.group(cls=Group, name="oscar-finetune", help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def command() -> None:
    """Fine-tune a model."""


def add_task(name: str, help: str, without: tuple[str, ...] = ()) -> None:
    """Add the command of a task, whose module in `oscar_train.tasks` has `make_task`."""
    decorate = settings_command(
        "finetune",
        Finetune,
        help,
        EXAMPLES[name],
        partial(resumed, schema=Finetune),
        fixed={"task": name},
        without=(*NOT_OF_TASKS, *without),
    )
    task_command = decorate(partial(_finetune, name))
    task_command.name = name
    command.add_command(task_command)


def _finetune(name: str, settings: Finetune, catalog: Catalog) -> None:
    """Check the arguments, open the shards, and only then import torch."""
    out = check(settings)
    with watched_signals() as stop:
        _train(name, settings, out, stop)


def _train(name: str, settings: Finetune, out: Path, stop: Stop) -> None:
    from oscar_train.data.sources import check_together, open_source

    sources = [open_source(place, settings.skip_corrupt) for place in settings.shards]
    beside = [open_source(place, settings.skip_corrupt, "--eval-shards") for place in settings.eval_shards]
    check_together([*sources, *beside])
    from oscar_train.training.auto_batch_size import lacking
    from oscar_train.training.loop import train

    make_task: Callable[..., object] = import_module(f"oscar_train.tasks.{MODULES[name]}").make_task

    try:
        train(settings, sources, out, stop, beside, make_task)  # type: ignore[arg-type]  # a module is known by its name
    except Exception as error:  # each library has its own for a lack of memory
        if not lacks_memory(error):
            raise
        raise lacking(settings) from None

    if os.environ.get("RANK", "0") == "0":
        say_next(*NEXT[name](out, settings))


def _search(out: Path, settings: Finetune) -> tuple[object, ...]:
    return ("oscar-predict", "search", "--model", out, "--shards", settings.shards[0], "a dog on a beach")


def _answer(out: Path, settings: Finetune) -> tuple[object, ...]:
    return ("oscar-predict", "answer", "--model", out, "--shards", settings.shards[0], "what is on the table?")


def _evaluate(out: Path, settings: Finetune) -> tuple[object, ...]:
    held_out = settings.eval_shards or settings.eval_fraction
    shards = settings.eval_shards or settings.shards
    return (
        "oscar-evaluate",
        out,
        *(word for place in shards for word in ("--shards", place)),
        *([] if held_out else ["--all"]),
    )


def _caption(out: Path, settings: Finetune) -> tuple[object, ...]:
    return ("oscar-predict", "caption", "--model", out, "--shards", settings.shards[0])


MODULES = {"retrieval": "retrieval", "vqa": "vqa", "gqa": "vqa", "nlvr2": "nlvr2", "caption": "caption"}
NEXT: dict[str, Callable[[Path, Finetune], tuple[object, ...]]] = {
    "retrieval": _search,
    "vqa": _answer,
    "gqa": _answer,
    "nlvr2": _evaluate,
    "caption": _caption,
}
add_task("retrieval", RETRIEVAL, without=(*OF_ANSWERS, *OF_CAPTIONS))
add_task("vqa", VQA, without=OF_CAPTIONS)
add_task("gqa", GQA, without=(*OF_ANSWERS, *OF_CAPTIONS))
add_task("nlvr2", NLVR2, without=(*OF_ANSWERS, *OF_CAPTIONS))
add_task("caption", CAPTION, without=(*OF_ANSWERS, *OF_ROWS))


def main() -> None:
    """Run the command."""
    run(command, environment=FEW_SHAPES, continues=True)


if __name__ == "__main__":
    main()
