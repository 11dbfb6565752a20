"""Draw a world where the truth is known: `python tools/make_scenes.py scenes --train 4000 --val 500 --seed 1`.

Writes FOLDER/{train,val}/*.jpg and, for each split, instances_SPLIT.json and captions_SPLIT.json as COCO has them,
questions_SPLIT.json and annotations_SPLIT.json as VQA has them. Scenes come in groups that share their classes and
differ in colours, counts, sizes and places, so that tags alone do not tell them apart.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE = 144  # pixels
CELL = SIDE // 3  # an object has a cell of its own, so that none is wholly hidden
GROUP = 4  # scenes that share their classes
RADII = {"small": 13, "big": 19, "huge": 26}  # pixels
COLOURS = {
    "red": (205, 45, 40),
    "green": (50, 150, 60),
    "blue": (50, 85, 205),
    "yellow": (230, 205, 55),
    "purple": (135, 60, 160),
    "orange": (235, 135, 40),
    "white": (238, 238, 238),
    "brown": (120, 75, 45),
}
# fmt: off
CLASSES = (
    "dog", "cat", "horse", "cow", "sheep", "bird", "bear", "zebra", "car", "truck", "bus", "train", "boat",
    "plane", "bike", "motorcycle", "chair", "table", "bed", "couch", "lamp", "clock", "book", "vase", "cup",
    "bowl", "bottle", "plate", "fork", "knife", "spoon", "pizza", "cake", "apple", "banana", "orange",
    "carrot", "sandwich", "tree", "flower", "rock", "fence", "bench", "kite", "ball", "bat", "glove",
    "racket", "shirt", "hat", "tie", "shoe", "bag", "box", "umbrella", "suitcase", "phone", "laptop", "mouse",
    "keyboard", "camera", "guitar", "sink", "door",
)
# fmt: on
SYNONYMS = {"dog": "puppy", "cat": "kitten", "horse": "pony", "couch": "sofa", "plane": "jet", "bike": "bicycle"}
PLURALS = {"sheep": "sheep", "bus": "buses", "knife": "knives", "mouse": "mice", "box": "boxes", "bench": "benches"}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
UNSEEN = ("on a sunny day", "in the afternoon", "at the market", "after the rain", "in a quiet place")
OUTLINES, TEXTURES = 16, 8

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE].astype(np.float32)


@dataclass(frozen=True)
class Thing:
    """An object of a scene: its place in CLASSES, looks, centre and radius in pixels, turn in radians."""

    label: int
    colour: str
    size: str
    outline: int
    texture: int
    x: float
    y: float
    radius: float
    turn: float

    @property
    def name(self) -> str:
        """The name of its class."""
        return CLASSES[self.label]


def is_held_out(label: int, colour: str) -> bool:
    """Whether a class in this colour is never drawn for training: about one pair of eight."""
    return (label * 3 + list(COLOURS).index(colour)) % 8 == 0


def choose_look(label: int, rng: np.random.Generator) -> tuple[int, int]:
    """Return an outline and a texture of a class. It has two of each, and their parities' XOR is a bit of the class.

    No sum of what an outline says and what a texture says tells the two classes of a pair apart.
    """
    pair, parity = label // 2, label % 2
    bit = int(rng.integers(2))
    return 2 * (pair // 4) + bit, 2 * (pair % 4) + (bit ^ parity)


def make_group(rng: np.random.Generator, split: str) -> list[list[Thing]]:
    """Return GROUP scenes of the same classes, which are long-tailed; each has 3 to 8 objects."""
    weights = 1 / (np.arange(len(CLASSES)) + 4)
    number = int(rng.integers(2, 5))
    labels = rng.choice(len(CLASSES), number, replace=False, p=weights / weights.sum())
    return [_place(labels, rng, split) for _ in range(GROUP)]


def _place(labels: npt.NDArray[Any], rng: np.random.Generator, split: str) -> list[Thing]:
    total = int(rng.integers(max(3, len(labels)), 9))
    members = np.concatenate([labels, rng.choice(labels, total - len(labels))])
    cells = rng.permutation(9)[:total]
    things = []
    for label, cell in zip(members.tolist(), cells.tolist(), strict=True):
        colours = [colour for colour in COLOURS if split != "train" or not is_held_out(label, colour)]
        size = str(rng.choice(list(RADII)))
        outline, texture = choose_look(label, rng)
        x, y = CELL * (np.array([cell % 3, cell // 3]) + 0.5) + rng.uniform(-5, 5, 2)
        radius = RADII[size] * rng.uniform(0.9, 1.1)
        turn = rng.uniform(-0.4, 0.4)
        colour = str(rng.choice(colours))
        things.append(Thing(label, colour, size, outline, texture, float(x), float(y), float(radius), float(turn)))
    return sorted(things, key=lambda thing: -thing.radius)  # small ones are drawn last, in front


def draw(things: list[Thing], rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], list[Mask]]:
    """Return the picture, uint8 [SIDE, SIDE, 3], and the visible pixels of each object."""
    picture = np.full((SIDE, SIDE, 3), rng.uniform(70, 180, 3), np.float32)
    picture += 25 * np.sin(COLUMNS * rng.uniform(0.02, 0.2) + ROWS * rng.uniform(0.02, 0.2))[..., None]
    owner = np.full((SIDE, SIDE), -1)
    for number, thing in enumerate(things):
        mask, shade = _paint(thing)
        owner[mask] = number
        colour = np.array(COLOURS[thing.colour]) + rng.normal(0, 12, 3)
        picture[mask] = colour * shade[mask][:, None]
    picture += rng.normal(0, 9, picture.shape)
    masks = [owner == number for number in range(len(things))]
    return np.clip(picture, 0, 255).astype(np.uint8), masks


def _paint(thing: Thing) -> tuple[Mask, Floats]:
    """Return the pixels of a thing, and how bright its texture makes each pixel."""
    across, down = (COLUMNS - thing.x) / thing.radius, (ROWS - thing.y) / thing.radius
    angle, distance = np.arctan2(down, across) + thing.turn, np.hypot(across, down)

    lobes, depth = 2 + thing.outline // 2, 0.12 if thing.outline % 2 else 0.42
    edge = 1 - depth * (0.5 + 0.5 * np.cos(lobes * angle))

    u, v = distance * np.cos(angle), distance * np.sin(angle)
    wave = _wave(thing.texture, u, v)
    return distance < edge, np.where(wave > 0, 1.0, 0.45).astype(np.float32)


def _wave(texture: int, u: Floats, v: Floats) -> Floats:
    """Return a texture over an object's own axes: bright where it is above 0."""
    wave: Floats
    match texture:
        case 0:
            wave = np.ones_like(u)
        case 1:
            wave = np.sin(9 * u)
        case 2:
            wave = np.sin(9 * v)
        case 3:
            wave = np.sin(7 * (u + v))
        case 4:
            wave = np.sin(7 * (u - v))
        case 5:
            wave = np.sin(9 * u) * np.sin(9 * v)
        case 6:
            wave = np.sin(12 * np.hypot(u, v))
        case _:
            wave = np.sin(5 * np.arctan2(v, u))
    return wave


def describe(things: list[Thing], areas: list[int], rng: np.random.Generator) -> str:
    """Return a caption that names 1 to 3 objects, large ones more often; about one in five says what is not seen."""
    number = int(rng.integers(1, 4))
    chances = np.array(areas) / sum(areas)
    chosen = [things[n] for n in rng.choice(len(things), number, replace=False, p=chances)]
    phrases: list[str] = []
    for label in dict.fromkeys(thing.label for thing in chosen):
        phrases.append(_phrase([thing for thing in things if thing.label == label], rng))
    text = " and ".join(phrases)
    if len(phrases) == 2 and len({thing.label for thing in things}) >= 2:
        text = _related(chosen, things) or text
    return f"{text} {rng.choice(UNSEEN)}" if rng.random() < 0.2 else text


def _phrase(alike: list[Thing], rng: np.random.Generator) -> str:
    name = alike[0].name
    if name in SYNONYMS and rng.random() < 0.3:
        name = SYNONYMS[name]
    if len(alike) > 1:
        return f"{NUMBERS[len(alike)]} {PLURALS.get(name, name + 's')}"
    return f"a {alike[0].size} {alike[0].colour} {name}" if rng.random() < 0.4 else f"{_one(alike[0].colour)} {name}"


def _one(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _related(chosen: list[Thing], things: list[Thing]) -> str | None:
    """Return how two objects stand to each other, if each is the only one of its class."""
    labels = [thing.label for thing in things]
    first, second = chosen[0], next(thing for thing in chosen if thing.label != chosen[0].label)
    if labels.count(first.label) > 1 or labels.count(second.label) > 1:
        return None
    if abs(first.x - second.x) > abs(first.y - second.y):
        relation = "left of" if first.x < second.x else "right of"
    else:
        relation = "above" if first.y < second.y else "below"
    return f"{_one(first.colour)} {first.name} {relation} {_one(second.colour)} {second.name}"


def ask(things: list[Thing], rng: np.random.Generator) -> list[tuple[str, str]]:
    """Return questions and answers: how many, is there (yes as often as no), and of single objects colour and side."""
    labels = [thing.label for thing in things]
    label = int(rng.choice(labels))
    other = int(rng.choice([n for n in range(len(CLASSES)) if n not in labels]))
    asked = label if rng.random() < 0.5 else other
    name = CLASSES[label]
    pairs = [
        (f"how many {PLURALS.get(name, name + 's')} are there?", str(labels.count(label))),
        (f"is there {_one(CLASSES[asked])}?", "yes" if asked == label else "no"),
    ]
    singles = [thing for thing in things if labels.count(thing.label) == 1]
    if singles:
        thing = singles[int(rng.integers(len(singles)))]
        pairs.append((f"what colour is the {thing.name}?", thing.colour))
    if len(singles) > 1:
        first, second = (singles[n] for n in rng.permutation(len(singles))[:2])
        answer = "left" if first.x < second.x else "right"
        pairs.append((f"is the {first.name} left or right of the {second.name}?", answer))
    return pairs


def make_split(folder: Path, split: str, number: int, seed: int) -> None:
    """Write the pictures and the four files of a split."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    first_id = 1 if split == "train" else 1_000_001
    for place in range(number):
        if place % GROUP == 0:
            group = make_group(np.random.default_rng([seed, first_id, place]), split)
        things, image_id = group[place % GROUP], first_id + place
        rng = np.random.default_rng([seed, image_id, 1])
        pixels, masks = draw(things, rng)
        file = f"{image_id:012}.jpg"
        Image.fromarray(pixels).save(folder / split / file, quality=92)
        images.append({"id": image_id, "file_name": file, "width": SIDE, "height": SIDE, "group": place // GROUP})

        for thing, mask in zip(things, masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y = int(columns[0]), int(rows[0])
            box = [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
            about = {"id": len(boxes) + 1, "image_id": image_id, "category_id": thing.label + 1, "iscrowd": 0}
            boxes.append(about | {"bbox": box, "area": int(mask.sum()), "colour": thing.colour, "size": thing.size})

        areas = [int(mask.sum()) for mask in masks]
        for _ in range(5):
            caption = describe(things, areas, rng)
            captions.append({"id": len(captions) + 1, "image_id": image_id, "caption": caption})
        for question, answer in ask(things, rng):
            about = {"question_id": len(questions) + 1, "image_id": image_id}
            questions.append(about | {"question": question})
            answers.append(about | {"multiple_choice_answer": answer, "answers": [{"answer": answer}] * 10})

    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    contents = {
        "instances": {"images": images, "annotations": boxes, "categories": categories},
        "captions": {"images": images, "annotations": captions},
        "questions": {"questions": questions},
        "annotations": {"annotations": answers},
    }
    for kind, content in contents.items():
        (folder / f"{kind}_{split}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description="Draw scenes whose objects, boxes, captions and answers are known.")
    parser.add_argument("folder", type=Path, help="where the pictures and files go, e.g. runs/scenes")
    parser.add_argument("--train", type=int, default=4000, help="scenes to train on (default: 4000)")
    parser.add_argument("--val", type=int, default=500, help="scenes held out (default: 500)")
    parser.add_argument("--seed", type=int, default=1, help="another seed draws other scenes (default: 1)")
    options = parser.parse_args()
    for split in ("train", "val"):
        make_split(options.folder, split, getattr(options, split), options.seed)
    print(f"{options.train:,} + {options.val:,} scenes in {options.folder}")


if __name__ == "__main__":
    main()
