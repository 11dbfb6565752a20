"""The drawn world has what the evidence needs: each property on 200 + 100 scenes."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

TOOL = Path(__file__).parents[2] / "tools/make_scenes.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("make_scenes", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


scenes = load()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    scenes.make_split(folder, "train", 200, seed=7)
    scenes.make_split(folder, "val", 100, seed=7)
    return folder


def read(world: Path, kind: str, split: str = "train") -> Any:
    return json.loads((world / f"{kind}_{split}.json").read_text())


def boxes_by_image(world: Path, split: str = "train") -> dict[int, list[Any]]:
    boxes: dict[int, list[Any]] = {}
    for box in read(world, "instances", split)["annotations"]:
        boxes.setdefault(box["image_id"], []).append(box)
    return boxes


def test_a_scene_has_3_to_8_objects_with_exact_boxes():
    rng = np.random.default_rng(3)
    for things in scenes.make_group(rng, "train"):
        _, masks = scenes.draw(things, rng)
        assert 3 <= len(things) <= 8
        assert all(mask.sum() > 50 for mask in masks)
        assert np.sum(masks, axis=0).max() == 1


def test_scenes_of_a_group_share_their_classes_and_differ_in_colours(world: Path):
    boxes = boxes_by_image(world)
    for first in range(1, 201, scenes.GROUP):
        group = [boxes[first + n] for n in range(scenes.GROUP)]
        assert len({frozenset(box["category_id"] for box in scene) for scene in group}) == 1
        assert len({tuple(sorted((b["category_id"], b["colour"]) for b in scene)) for scene in group}) > 1


def test_held_out_compositions_are_drawn_for_val_only(world: Path):
    def count(split: str) -> int:
        boxes = read(world, "instances", split)["annotations"]
        return sum(scenes.is_held_out(box["category_id"] - 1, box["colour"]) for box in boxes)

    assert count("train") == 0
    assert count("val") > 20


def test_classes_have_a_long_tail(world: Path):
    counts = Counter(box["category_id"] for box in read(world, "instances")["annotations"])
    assert sum(number for _, number in counts.most_common(10)) > 0.3 * counts.total()
    assert len(counts) > 40


def test_captions_name_1_to_3_of_the_classes_and_one_in_five_says_what_is_not_seen(world: Path):
    boxes, captions = boxes_by_image(world), read(world, "captions")["annotations"]
    names = {word: name for name in scenes.CLASSES for word in (name, scenes.PLURALS.get(name, name + "s"))}
    names |= {synonym: name for name, synonym in scenes.SYNONYMS.items()}
    names |= {synonym + "s": name for name, synonym in scenes.SYNONYMS.items()}
    for caption in captions:
        colours_as_words = {"orange"}
        said = {names[word] for word in caption["caption"].split() if word in names} - colours_as_words
        seen = {scenes.CLASSES[box["category_id"] - 1] for box in boxes[caption["image_id"]]}
        assert said <= seen
        assert len(said) <= 3
    unseen = sum(any(words in caption["caption"] for words in scenes.UNSEEN) for caption in captions)
    assert 0.13 < unseen / len(captions) < 0.27


def test_no_answer_is_given_to_30_percent_of_the_questions_and_yes_is_as_likely_as_no(world: Path):
    answers = Counter(one["multiple_choice_answer"] for one in read(world, "annotations")["annotations"])
    assert max(answers.values()) < 0.3 * answers.total()
    assert 0.6 < answers["yes"] / answers["no"] < 1.6


def test_outline_and_texture_do_not_tell_the_class_by_a_sum():
    """A linear probe of both, one-hot, is at chance for the two classes of a pair; their XOR tells them apart."""
    rng = np.random.default_rng(0)
    labels = rng.integers(len(scenes.CLASSES), size=2000)
    looks = np.array([scenes.choose_look(int(label), rng) for label in labels])
    features = np.hstack([np.eye(scenes.OUTLINES)[looks[:, 0]], np.eye(scenes.TEXTURES)[looks[:, 1]]])
    weights = np.linalg.lstsq(features[:1000], labels[:1000] % 2 - 0.5, rcond=None)[0]
    right = (features[1000:] @ weights > 0) == (labels[1000:] % 2 == 1)
    assert 0.42 < right.mean() < 0.58
    assert np.array_equal(looks.sum(1) % 2, labels % 2)


def test_a_seed_draws_the_same_world_and_another_seed_another(world: Path, tmp_path: Path):
    scenes.make_split(tmp_path / "same", "train", 8, seed=7)
    scenes.make_split(tmp_path / "other", "train", 8, seed=8)
    pixels = [np.asarray(Image.open(folder / "train/000000000003.jpg")) for folder in (world, tmp_path / "same")]
    assert np.array_equal(*pixels)
    captions = read(tmp_path / "same", "captions")["annotations"]
    assert captions == read(world, "captions")["annotations"][: len(captions)]
    assert read(tmp_path / "other", "captions")["annotations"] != captions
