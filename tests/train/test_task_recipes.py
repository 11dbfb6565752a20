"""The recipes for tasks are the released ones (microsoft/Oscar: MODEL_ZOO.md, VinVL_MODEL_ZOO.md)."""

from dataclasses import fields

import pytest

from oscar_common.config import installed_catalog
from oscar_common.settings import TASKS, Finetune, decisive

IMAGES = 113_287  # of Karpathy's training split, five captions each or a few more: 566,435
QUESTIONS = {"train": 443_757, "train and val": 658_111}
STATEMENTS = 86_373
GQA_ALL = 14_305_356


@pytest.mark.parametrize(
    ("name", "batch", "lr", "epochs", "samples", "length", "regions", "dropout", "warmup"),
    [
        ("retrieval-base", 4 * 64, 2e-5, 20, 5 * IMAGES, 70, 50, None, 0),
        ("retrieval-large", 8 * 16, 1e-5, 30, 5 * IMAGES, 70, 50, None, 0),
        ("retrieval-plus-base", 8 * 16, 2e-5, 30, 5 * IMAGES, 70, 70, None, 0),
        ("retrieval-plus-large", 8 * 16, 7.5e-6, 30, 5 * IMAGES, 70, 70, None, 0),
        ("vqa-base", 32, 5e-5, 25, QUESTIONS["train"], 128, 50, 0.3, 0),
        ("vqa-large", 24, 3e-5, 25, QUESTIONS["train and val"], 128, 50, 0.3, 0),
        ("gqa-base", 48, 5e-5, 5, GQA_ALL, 165, 45, 0.3, 0),
        ("nlvr2-base", 72, 3e-5, 20, STATEMENTS, 55, 40, 0.3, 10_000),
        ("nlvr2-large", 24, 3e-5, 20, STATEMENTS, 55, 40, 0.3, 5_000),
    ],
)
def test_recipes(
    name: str,
    batch: int,
    lr: float,
    epochs: int,
    samples: int,
    length: int,
    regions: int,
    dropout: float | None,
    warmup: int,
):
    recipe = installed_catalog().finetune[name]
    assert recipe.task == name.partition("-")[0]
    assert (recipe.batch_size, recipe.lr, recipe.warmup_steps) == (batch, lr, warmup)
    assert recipe.steps == pytest.approx(epochs * samples / batch, rel=1e-3)
    assert (recipe.text_length, recipe.regions, recipe.dropout) == (length, regions, dropout)
    assert (recipe.weight_decay, recipe.max_grad_norm, recipe.schedule) == (0.05, 1.0, "linear")


def test_each_task_has_a_recipe_and_every_setting_says_whether_a_run_depends_on_it():
    assert {recipe.task for recipe in installed_catalog().finetune.values()} == set(TASKS)
    assert {"task", "attention", "dropout", "text_length", "lr"} <= set(decisive(Finetune))
    assert len(decisive(Finetune)) < len(fields(Finetune))
