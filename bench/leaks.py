"""How much the texts that replace others give away, and how often they say the same as what they replace.

    python bench/leaks.py [--captions captions_val2017.json] [--shards DIR]

What replaces a text gives itself away where its kind is not the one that the row always has: a tag list, or a caption,
in the place of an answer. Then the contrastive loss is answered without a look at the image. And the releases reject
nothing: "yes" may be replaced by "yes". Here each triple is drawn many times, as in training, by the presets' own
pools; counted are the kinds of what replaces w and q, and the candidates of other images that are turned away because
they are the same set of tokens.

Unless --shards names a folder, a corpus is made with the kinds of Oscar+'s (of 8.85M texts 72 % captions, 28 %
questions). Its captions are those of a COCO file, or of random words; its tag lists have 10 to 50 names of Visual
Genome's 1,600 classes, by Zipf's law; of its answers a quarter is yes or no, the rest is one of 3,000 words, by Zipf's
law (so rejected answers are only as true as that; kinds are not touched by it). The numbers go to
bench/results/leaks.json.
"""

import json
import tempfile
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from machine import machine
from oscar_common.sample import ImageRecord, Regions, Sample, Text
from oscar_common.vocabulary import NAMES, read_names
from oscar_common.wordpiece import SHIPPED
from oscar_shards.manifest import DetectorRecord, Layout, Manifest, PlanRecord, write_manifest
from oscar_shards.write import shard_path, write_shard
from oscar_train.data.corpus import Corpus
from oscar_train.data.sampling.negatives import TRIES, Pool, alike, make_pools, replaced
from oscar_train.data.sampling.philox import SAMPLE, words
from oscar_train.data.sampling.text_pairs import lengths_of, texts, truncated
from oscar_train.data.stream import open_stream
from oscar_train.data.texts.phrases import QA
from oscar_train.objectives import TABLE, Objective

RESULTS = Path(__file__).parent / "results" / "leaks.json"
PRESETS = (("oscar", "paper"), ("oscar", "release"), ("oscar-plus", "release"))
IMAGES, FEATURE_DIM = 4000, 8
QA_SHARE = 0.28  # of the texts
YES_NO = 0.25  # of the answers
KINDS = (("a caption", "tags"), ("a question", "an answer"))  # w and q of a triple of each kind
ROWS = 1_000_000
Ints = npt.NDArray[np.int64]


@click.command(help=__doc__)
@click.option("--shards", help="A folder of shards to measure.")
@click.option("--captions", type=click.Path(path_type=Path), help="COCO captions for the corpus that is made.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(shards: str | None, captions: Path | None, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = shards or str(make_shards(Path(folder, "shards"), captions))
        with open_stream([place], batch_size=2, cache=folder) as stream:
            corpus = stream.corpus
        found = {"-".join(name): measure(corpus, TABLE[name]) for name in PRESETS}
    questions = int(np.count_nonzero(corpus.kind == QA))
    said = {
        "texts": (shards and Path(shards).name) or (captions and captions.name) or "random words",
        "triples": len(corpus),
        "questions": round(questions / len(corpus), 3),
        "rows_drawn": ROWS,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine(), "corpus": said, **found}, indent=1) + "\n")
    print(json.dumps(found, indent=1), f"\nwritten: {out}")


def measure(corpus: Corpus, objective: Objective) -> dict[str, Any]:
    """Return for both sides what replaces texts, and how many candidates are turned away as identical."""
    rows = np.random.default_rng(0).integers(len(corpus), size=ROWS)
    drawn = words(0, SAMPLE, 0, 0, ROWS, 4 + TRIES)
    pools = make_pools(corpus, [Fraction(1)] * len(corpus.sources), objective)
    sides = replaced(corpus, pools, objective, rows, drawn[:, 0], drawn[:, 4:])
    result: dict[str, Any] = {}
    given_away = np.zeros(ROWS, bool)
    for side, found, lent in (("w", sides.w, np.ones(ROWS, bool)), ("q", sides.q, sides.lent)):
        changed = found != rows
        if changed.any():
            kind, other = corpus.kind[rows], corpus.kind[found]
            foreign = changed & ((kind != other) | (lent & (side == "q")))
            given_away |= foreign
            result[f"wrong {side}"] = {
                "rows": shares(kind[changed], foreign[changed]),
                "what_replaces": what(kind[changed], other[changed], lent[changed]),
                "identical_candidates": identical(corpus, getattr(pools, side), objective, rows, side == "w"),
            }
    # Whoever knows only the kinds says "matched" unless they are foreign
    matched = (sides.w == rows) & (sides.q == rows)
    result["right_by_kind_alone"] = round(float((matched | given_away).mean()), 4)
    result["right_by_saying_matched"] = round(float(matched.mean()), 4)
    return result


def shares(kind: npt.NDArray[np.int8], foreign: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Return how many are given away by their kind: of all, of captions, of questions."""
    return {
        "given_away": percent(foreign),
        "given_away_of_captions": percent(foreign[kind != QA]),
        "given_away_of_questions": percent(foreign[kind == QA]),
    }


def what(kind: npt.NDArray[np.int8], other: npt.NDArray[np.int8], lent: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Return what replaces the texts of rows of each kind."""
    result: dict[str, dict[str, float]] = defaultdict(dict)
    for mine, (row, _) in enumerate(KINDS):
        for theirs, names in enumerate(KINDS):
            for from_w in (True, False):
                share = percent((other == theirs)[kind == mine] & (lent == from_w)[kind == mine])
                if share:
                    result[row][names[0 if from_w else 1]] = share
    return result


def identical(
    corpus: Corpus, pools: tuple[Pool | None, ...], objective: Objective, rows: Ints, of_w: bool
) -> dict[str, float]:
    """Return the share of candidates, not empty and of other images, that are the same set of tokens."""
    drawn = words(1, SAMPLE, 0, 0, len(rows), 4)[:, 0]
    kind, others = corpus.kind[rows], rows.copy()
    for number, pool in enumerate(pools):
        if pool is not None:
            others[kind == number] = pool.draw(drawn[kind == number])
    as_w = np.full(len(rows), of_w) | ((drawn & np.uint64(1)).astype(bool) & (objective.negatives == "lines"))
    own, len_own = texts(corpus, rows, np.full(len(rows), of_w))
    new, len_new = texts(corpus, others, as_w)
    beside = lengths_of(corpus, rows, not of_w)

    def seen(lengths: Ints) -> Ints:
        return truncated(lengths, beside)[0] if of_w else truncated(beside, lengths)[1]

    same = alike(own, seen(len_own), new, seen(len_new))
    asked = (corpus.image[rows] != corpus.image[others]) & (len_new > 0)
    return {
        "all": percent(same[asked]),
        "of_captions": percent(same[asked & (kind != QA)]),
        "of_questions": percent(same[asked & (kind == QA)]),
    }


def percent(values: npt.NDArray[np.bool_]) -> float:
    return round(100 * float(values.mean()), 3) if len(values) else 0.0


def make_shards(folder: Path, captions: Path | None) -> Path:
    """Make a corpus with the kinds of Oscar+'s."""
    rng = np.random.default_rng(0)
    found = [word for word in (SHIPPED / "vocab.txt").read_text().split() if word.isalpha() and len(word) > 1]
    names, answers = read_names("", NAMES / "objects.txt", ""), rng.permutation(found)[:3000]
    written = read_captions(captions) if captions else [[sentence(rng, found, 10)] for _ in range(IMAGES)]
    asked = QA_SHARE / (1 - QA_SHARE) * sum(map(len, written)) / len(written)  # questions of an image

    def sample(number: int, image_captions: list[str]) -> Sample:
        count = int(rng.integers(10, 51))
        spoken = [Text(kind="caption", source="coco", id=str(n), text=text) for n, text in enumerate(image_captions)]
        for n in range(rng.poisson(asked)):
            yes_no = rng.random() < YES_NO
            answer = str(rng.choice(["yes", "no"]) if yes_no else answers[zipf(rng, len(answers))])
            question = f"{sentence(rng, found, 6)}?"
            spoken.append(Text(kind="qa", source="vqa", id=f"q{n}", question=question, answer=answer))
        return Sample(
            key=f"coco-{number}",
            image=ImageRecord(source="coco", id=str(number), path="", width=640, height=480, sha256=f"{number:064x}"),
            regions=Regions(
                boxes=np.tile(np.array([0, 0, 9, 9], np.float32), (count, 1)),
                features=np.zeros((count, FEATURE_DIM), np.float16),
                tags=[names[zipf(rng, len(names))] for _ in range(count)],
                scores=[0.5] * count,
            ),
            texts=spoken,
        )

    folder.mkdir()
    write_shard(
        shard_path(folder, "shard", 0), map(sample, range(len(written)), written), Layout(feature_dim=FEATURE_DIM)
    )
    write_manifest(folder, make_manifest(names, len(written), sum(map(len, written))))
    return folder


def make_manifest(names: list[str], images: int, count: int) -> Manifest:
    detector = DetectorRecord(
        name="none", preset="detectron2", config="", weights="none", weights_sha256="0" * 64, classes=names,
        feature_dim=FEATURE_DIM,
    )  # fmt: skip
    plan = PlanRecord(
        images="none", captions=None, num_images=images, num_texts=count, images_per_shard=images, num_shards=1,
        sha256="0" * 64,
    )  # fmt: skip
    return Manifest(name="shard", detector=detector, settings={}, plan=plan)


def read_captions(path: Path) -> list[list[str]]:
    """Return the captions of each image of a COCO file."""
    of: dict[int, list[str]] = defaultdict(list)
    for entry in json.loads(path.read_text())["annotations"]:
        of[entry["image_id"]].append(entry["caption"])
    return list(of.values())


def sentence(rng: np.random.Generator, vocabulary: list[str], length: int) -> str:
    return " ".join(vocabulary[zipf(rng, len(vocabulary))] for _ in range(length))


def zipf(rng: np.random.Generator, size: int) -> int:
    """Return a number below `size`, n about as often as 1 / (n + 1)."""
    return int(size ** rng.random()) - 1


if __name__ == "__main__":
    main()
