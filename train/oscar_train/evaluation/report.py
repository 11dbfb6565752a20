"""An evaluation for people: a table, or a line beside a step."""

import math

import numpy as np
from rich.table import Table

from oscar_common.progress import plural
from oscar_train.evaluation.measure import RANKS, SIDES
from oscar_train.evaluation.questions import QuestionSet

Numbers = dict[str, float]


def describe_question_set(question_set: QuestionSet) -> str:
    """Say what is asked about."""
    images = len(np.unique(question_set.corpus.image[question_set.triples]))
    gallery = f", {len(question_set.gallery):,} of them for retrieval" if len(question_set.gallery) else ""
    return f"{plural(len(question_set.triples), 'triple')} of {plural(images, 'image')}{gallery}"


def line(values: Numbers) -> str:
    """Say an evaluation in one line."""
    parts = [
        f"{side} {values[f'{side}_loss']:.4f} ({values[f'{side}_accuracy']:.1%})"
        for side in SIDES
        if not math.isnan(values[f"{side}_loss"])
    ]
    parts.append(f"match {values['match_loss']:.4f} ({values['match_accuracy']:.1%})")
    for way, name in (("t2i", "text_to_image"), ("i2t", "image_to_text")):
        if f"{name}_r1" in values:
            shares = "/".join(f"{100 * values[f'{name}_r{k}']:.1f}" for k in RANKS)
            parts.append(f"{way} R@1/5/10 {shares} %")

    return "held out: " + "  ".join(parts)


def table(question_set: QuestionSet, columns: dict[str, Numbers], title: str) -> Table:
    """Put evaluations side by side; what cannot be measured on these shards is a dash."""
    grid = Table(title=title, title_justify="left")
    grid.add_column("", no_wrap=True)
    for name in (*columns, "chance"):
        grid.add_column(name, justify="right")

    for name in next(iter(columns.values())):
        grid.add_row(
            name.replace("_", " "),
            *(_shown(name, values[name]) for values in columns.values()),
            _chance(question_set, name),
        )

    return grid


def _shown(name: str, value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.4f}" if name.endswith("_loss") else f"{value:.1%}"


def _chance(question_set: QuestionSet, name: str) -> str:
    """Return what a model gets that does not look."""
    if name == "match_accuracy":
        return "50.0%"  # always "matched"
    if "_r" in name and name.rpartition("_r")[2].isdigit():
        return f"{min(1.0, int(name.rpartition('_r')[2]) / len(question_set.gallery)):.1%}"
    return ""
