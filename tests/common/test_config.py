"""pipelines.yaml: every mistake is named with its place, and YAML's surprises are undone."""

from pathlib import Path

import pytest

from oscar_common.config import load_catalog
from oscar_common.errors import UsageError


def load(tmp_path: Path, text: str):
    (tmp_path / "p.yaml").write_text(text)
    return load_catalog(tmp_path / "p.yaml")


def test_the_shipped_file_is_valid():
    catalog = load_catalog(Path(__file__).parents[2] / "pipelines.yaml")
    assert set(catalog.pipelines["demo"].extract["dataset"]) <= set(catalog.datasets)
    assert catalog.pipelines["demo"].extract["detector"] in catalog.detectors


def test_scientific_notation_is_a_number_although_yaml_says_text(tmp_path):
    catalog = load(tmp_path, "pipelines: {a: {train: {lr: 5e-5, max_grad_norm: 1}}}")
    assert catalog.pipelines["a"].train["lr"] == 5e-5
    assert catalog.pipelines["a"].train["max_grad_norm"] == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pipelnes: {}", "unknown key 'pipelnes' (did you mean 'pipelines'?"),
        ("pipelines: {a: {train: {stpes: 3}}}", "pipelines.a: train: unknown key 'stpes' (did you mean 'steps'?"),
        ("pipelines: {a: {train: {steps: 1.5}}}", "steps: 1.5 is no whole number"),
        ("pipelines: {a: {train: {steps: true}}}", "steps: True is no whole number"),
        ("pipelines: {a: {train: {steps: 0}}}", "steps: 0 is out of range; it must be at least 1"),
        ("pipelines: {a: {extract: {out: no}}}", "out: False is no text; put it in quotes"),
        ("pipelines: {a: {extract: {out: 12:00:00}}}", "out: 43200 is no text; put it in quotes"),
        ("pipelines: {a: {train: {device: gpu}}}", "device: 'gpu' is not allowed"),
        ("datasets: {a: {layout: coko}}", "datasets.a: layout: 'coko' is not allowed (did you mean 'coco'?"),
        ("datasets: [a]", "datasets: ['a'] is no mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path, text, message):
    with pytest.raises(UsageError) as error:
        load(tmp_path, text)
    assert message in error.value.message
    assert str(tmp_path / "p.yaml") in error.value.message
    assert "\n" not in error.value.message
