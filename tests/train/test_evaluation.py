"""Images held out of training, and what a model is asked about them."""

import csv
import json
import math
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from running import rows
from small_shards import CLASSES, P, make_samples, write_folder
from support import error_line, run_here, train

from oscar_common.errors import UsageError
from oscar_common.sample import Regions, Sample, Text
from oscar_train.batch import IGNORED, Batch
from oscar_train.data.batch_buffer import make_batch_buffer
from oscar_train.data.corpus import Corpus
from oscar_train.data.stream import Stream, open_stream
from oscar_train.data.texts.tags import TagRule
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.evaluation.command import command
from oscar_train.evaluation.held_out import apart, held_images, split
from oscar_train.evaluation.measure import Answering, Interrupted, answer, measure, names
from oscar_train.evaluation.questions import SHUFFLES, QuestionSet, make_question_set
from oscar_train.model.oscar import OscarForPreTraining, oscar_config, random_config
from oscar_train.objectives import TABLE
from oscar_train.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
OSCAR, PLUS = TABLE["oscar", "paper"], TABLE["oscar-plus", "paper"]


def question_set_of(stream: Stream, objective=OSCAR, only=None, triples=0, images=20, seed=0) -> QuestionSet:
    return make_question_set(stream.corpus, stream.reader, objective, only, triples=triples, images=images, seed=seed)


def network(stream: Stream, classes: int = 2) -> OscarForPreTraining:
    torch.manual_seed(0)
    config = random_config("tiny", stream.corpus.tokenizer.size)
    config.num_contrast_classes = classes
    config.initializer_range = 0.2  # so that it has opinions
    return OscarForPreTraining(oscar_config(config, stream.corpus.feature_dim)).eval()


def ask(question_set: QuestionSet, forward, size: int = 7, shuffled: str | None = None) -> dict[str, float]:
    return measure(question_set, Answering(forward=forward, ranks=ALONE, size=size), shuffled)


def test_an_image_itself_decides_whether_it_is_held_out(samples: list[Sample], tmp_path: Path, tokenizer: Tokenizer):
    some = make_samples(300)
    found = []
    for number, order in enumerate((some, some[::-1][:200])):
        folder = write_folder(tmp_path / str(number), order, per_shard=40)
        with open_stream([str(folder)], batch_size=4, tokenizer=tokenizer) as stream:
            corpus = stream.corpus
            held = held_images(corpus.images, 0.2)
            found.append({corpus.key(image) for image in np.flatnonzero(held)})
            assert held_images(corpus.images, 0.1).sum() < held.sum()
            assert (held_images(corpus.images, 0.3) | ~held).all()  # a larger share holds the same ones, and more
    kept = {sample.key for sample in some[::-1][:200]}
    assert found[1] == found[0] & kept
    assert 0.1 < len(found[0]) / 300 < 0.3


def test_what_is_held_out_is_in_no_batch_not_even_as_a_negative(samples: list[Sample], tmp_path: Path, tokenizer):
    named = [replace(s, texts=[replace(t, text=f"number{i}") for t in s.texts]) for i, s in enumerate(make_samples(60))]
    named = [s for s in named if all(t.kind == "caption" for t in s.texts)]
    folder = write_folder(tmp_path / "shards", named)

    def texts(stream: Stream, triples: np.ndarray) -> set[tuple[int, ...]]:
        return {tuple(stream.corpus.first[int(t)].tolist()) for t in triples}

    visual = TABLE["visualbert", "paper"]
    options = {"batch_size": 16, "tokenizer": tokenizer, "objective": visual, "tags": TagRule(which="none")}
    with open_stream([str(folder)], **options, only=lambda corpus: split(corpus, 0.3).trained) as stream:
        sides = split(stream.corpus, 0.3)
        held, trained = texts(stream, sides.held), texts(stream, sides.trained)
        assert held
        assert not held & trained
        met, seen = set(), []
        for step in range(3 * len(sides.trained) // 16):
            batch = stream.text(step)
            seen.extend(stream.triples(step).tolist())
            ids = np.where(batch.mlm_labels == IGNORED, batch.input_ids, batch.mlm_labels)
            inside = [row[(row != 0) & (row != tokenizer.cls) & (row != tokenizer.sep)] for row in ids]
            met |= {tuple(row.tolist()) for row in inside}
        assert met == trained
        assert set(seen) == set(sides.trained.tolist())


def test_the_same_image_in_two_sources_is_on_one_side(tmp_path: Path, tokenizer: Tokenizer):
    """By its bytes where they are known, whatever it is called there; else by its key."""
    some = make_samples(120)
    bytes_known = [replace(s, image=replace(s.image, sha256=f"{i:064x}")) for i, s in enumerate(some)]
    renamed = [replace(s, key=f"other-{s.key}") for s in bytes_known]
    folders = [write_folder(tmp_path / n, s) for n, s in (("a", bytes_known), ("b", renamed))]
    with open_stream([str(f) for f in folders], batch_size=4, tokenizer=tokenizer) as stream:
        corpus, sides = stream.corpus, split(stream.corpus, 0.25)
        contents = [set(corpus.images.content[corpus.image[side]].tolist()) for side in (sides.held, sides.trained)]
        assert not contents[0] & contents[1]
        assert len(sides.held) + len(sides.trained) == len(corpus)
        assert len(contents[0]) > 10


def test_images_of_eval_shards_are_not_trained_on(samples: list[Sample], shards: Path, tmp_path: Path, tokenizer):
    beside = write_folder(tmp_path / "beside", samples[10:20])
    with open_stream([str(shards)], batch_size=4, tokenizer=tokenizer) as stream:
        with open_stream([str(beside)], batch_size=4, tokenizer=tokenizer) as other:
            left = apart(stream.corpus, other.corpus.images)
        keys = {stream.corpus.key(i) for i in stream.corpus.image[left]}
    assert keys == {s.key for s in samples if s.texts} - {s.key for s in samples[10:20]}


def slowly(question_set: QuestionSet, model: OscarForPreTraining) -> dict[str, float]:
    """The same numbers, one triple at a time and with plain words."""
    corpus, sums = question_set.corpus, {}
    for place, triple in enumerate(question_set.triples.tolist()):
        for name in question_set.asked:
            buffer = make_batch_buffer(1, corpus.feature_dim)
            question_set.regions(
                question_set.triples[place : place + 1], question_set.partners[place : place + 1], buffer
            )
            question_set.text(name, place, buffer)
            batch = buffer.batch
            words, pairs = answer(model, "fp32", batch)
            if (label := int(batch.match_labels[0])) != IGNORED:
                counted = sums.setdefault(name, [])
                counted.append((-float(pairs[0].log_softmax(-1)[label]), int(pairs[0].argmax()) == label))
            if name != "matched":
                continue
            masked = [(c, int(x)) for c, x in enumerate(batch.mlm_labels[0]) if x != IGNORED]
            for row, (column, label) in enumerate(masked):
                first_sep = batch.input_ids[0].tolist().index(question_set.corpus.tokenizer.sep)
                side = "words" if column < first_sep else ("tags", "answers")[int(corpus.kind[triple])]
                loss = -float(words[row].log_softmax(-1)[label])
                sums.setdefault(side, []).append((loss, int(words[row].argmax()) == label))
    return {name: tuple(np.mean(found, 0)) for name, found in sums.items()}


@pytest.mark.parametrize("objective", [OSCAR, PLUS, TABLE["visualbert", "release"]])
@torch.no_grad()
def test_the_numbers_are_those_of_a_slow_count(stream: Stream, objective):
    question_set = question_set_of(stream, objective, images=0, seed=1)
    model = network(stream, len(objective.classes))
    values, slow = ask(question_set, lambda batch: answer(model, "fp32", batch)), slowly(question_set, model)
    assert list(values) == names(question_set)
    for side in ("words", "tags", "answers"):
        loss, accuracy = slow[side]
        assert values[f"{side}_loss"] == pytest.approx(loss, rel=1e-5)
        assert values[f"{side}_accuracy"] == pytest.approx(accuracy)
    called = {
        name: question_set.objective.classes[question_set.objective.label(name)].replace(" ", "_")
        for name in question_set.asked
    }
    for name, plain in called.items():
        assert values[f"{plain}_accuracy"] == pytest.approx(slow[name][1])
    parts = [1 - objective.wrong_w - objective.wrong_q, objective.wrong_w, objective.wrong_q]
    weights = dict(zip(("matched", "wrong w", "wrong q"), parts, strict=True))
    for column, what in enumerate(("match_loss", "match_accuracy")):
        assert values[what] == pytest.approx(sum(weights[n] * slow[n][column] for n in question_set.asked), rel=1e-5)


@torch.no_grad()
def test_neither_the_size_of_batches_nor_ranks_change_a_number(stream: Stream):
    question_set, model = question_set_of(stream, PLUS, triples=50, images=12), network(stream, 3)

    def forward(batch: Batch):
        return answer(model, "fp32", batch)

    one = ask(question_set, forward, 50)
    for size in (1, 8, 13):
        assert ask(question_set, forward, size) == pytest.approx(one, rel=1e-5)
    assert (
        question_set_of(stream, replace(PLUS, negatives="lines", exact=False), triples=50, images=12).objective
        == question_set.objective
    )


class Seer:
    """Sees the classes in the features of small_shards and reads the text; knows nothing else.

    Its "matched" is how many of the seen classes q names, and (on unmasked text) how many of them w names.
    """

    def __init__(self, stream: Stream) -> None:
        self.tokenizer = stream.corpus.tokenizer
        self.names = [set(self.tokenizer([c], 8)[0].tolist()) for c in CLASSES]
        self.matched = OSCAR.label("matched")

    def __call__(self, batch: Batch):
        words, pairs = [], []
        for row in range(len(batch.triples)):
            seen = {
                int(f.argmax()) for f, there in zip(batch.features[row], batch.region_mask[row], strict=True) if there
            }
            tokens = [int(x) for x in batch.input_ids[row]]
            types = batch.token_type_ids[row].tolist()
            w, q = ({t for t, y in zip(tokens, types, strict=True) if y == side} for side in (0, 1))
            visible = set().union(*(self.names[c] for c in seen)) if seen else set()
            wrong = [c for c in range(len(CLASSES)) if c not in seen and self.names[c] <= q]
            score = -float(len(wrong))
            if not (batch.mlm_labels[row] != IGNORED).any():
                score -= sum(self.names[c] <= w for c in range(len(CLASSES)) if c not in seen)
                score += sum(self.names[c] <= w for c in seen)
            pairs.append([0.5, score + 1] if self.matched else [score + 1, 0.5])
            for column in (batch.mlm_labels[row] != IGNORED).nonzero()[:, 0].tolist():
                guess = torch.zeros(self.tokenizer.size)
                for token in visible if types[column] else {self.tokenizer.sep}:
                    guess[token] = 1 + (token == int(batch.mlm_labels[row, column]))
                words.append(guess)
        return torch.stack(words) if words else torch.zeros(0, self.tokenizer.size), torch.tensor(pairs)


def plain_sample(number: int, classes: tuple[int, ...]) -> Sample:
    """An image of some classes, one region each, and a caption that names them."""
    tags = [CLASSES[c] for c in classes]
    features = np.random.default_rng(number).normal(0, 0.1, (len(classes), P))
    features[np.arange(len(classes)), classes] += 3
    sample = make_samples(2)[1]
    return replace(
        sample,
        key=f"plain-{number}",
        regions=Regions(
            boxes=np.tile(np.array([0, 0, 9, 9], np.float32), (len(classes), 1)),
            features=features.astype(np.float16),
            tags=tags,
            scores=[0.5] * len(classes),
        ),
        texts=[Text(kind="caption", source="c", id="0", text=" ".join(tags))],
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer):
    """What one that sees, reads and compares knows: as it is, and with something shuffled."""
    samples = [plain_sample(n, classes) for n, classes in enumerate(combinations(range(9), 3))]
    folder = write_folder(tmp_path_factory.mktemp("seen") / "shards", samples)
    with open_stream([str(folder)], batch_size=4, tokenizer=tokenizer) as stream:
        question_set = question_set_of(stream, OSCAR, images=30)
        return {name: ask(question_set, Seer(stream), 16, name) for name in (None, *SHUFFLES)}


def test_what_is_shuffled_destroys_what_rests_on_it_and_nothing_else(seen):
    whole = seen[None]
    assert whole["tags_accuracy"] > 0.95
    assert whole["match_accuracy"] > 0.85
    assert whole["text_to_image_r1"] > 0.6
    for name in ("features", "tags"):  # q beside v
        assert seen[name]["match_accuracy"] < 0.62
        assert seen[name]["tags_accuracy"] < 0.75
        assert seen[name]["matched_accuracy"] < 0.4
        assert seen[name]["polluted_accuracy"] == pytest.approx(whole["polluted_accuracy"], abs=0.1)
        assert seen[name]["words_accuracy"] == whole["words_accuracy"]
    for number in ("tags_accuracy", "match_accuracy", "matched_accuracy", "polluted_accuracy"):
        assert seen["captions"][number] == pytest.approx(whole[number], abs=0.02)
    for name in ("features", "captions"):  # w beside v
        for way in ("text_to_image", "image_to_text"):
            assert seen[name][f"{way}_r1"] < 0.2
            assert seen[name][f"{way}_r10"] < 0.6


@pytest.mark.parametrize("score", [0.0, math.nan])
def test_scores_that_are_equal_or_no_numbers_find_nothing(stream: Stream, score: float):
    def forward(batch: Batch):
        masked = int((batch.mlm_labels != IGNORED).sum())
        return torch.zeros(masked, stream.corpus.tokenizer.size), torch.full((len(batch.triples), 2), score)

    found = ask(question_set_of(stream, images=12), forward)
    assert found["text_to_image_r10"] == found["image_to_text_r1"] == 0


def test_an_evaluation_can_be_interrupted(stream: Stream):
    model = network(stream)
    asked = iter([False, False, True])
    answering = Answering(
        forward=lambda batch: answer(model, "fp32", batch), ranks=ALONE, size=8, stopped=lambda: next(asked)
    )
    with pytest.raises(Interrupted):
        measure(question_set_of(stream), answering)


COMMON = ("--init", "random:tiny", "--steps", 6, "--batch-size", 8, "--device", "cpu", "--eval-images", 8)


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "run"
    done = train("--shards", shards, "--out", out, *COMMON, "--eval-fraction", 0.3, "--eval-every", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held out: words") == 2
    return out


def evaluations(out: Path) -> list[dict[str, str]]:
    with (out / "evaluation.csv").open() as file:
        return list(csv.DictReader(file))


def evaluate(*arguments: object):
    return run_here(command, *arguments)


def test_the_command_finds_the_numbers_of_the_run(run: Path, tmp_path: Path, shards: Path):
    told = evaluate(run, "--images", 8, "--json", tmp_path / "found.json", "--controls", "--device", "cpu")
    assert told.returncode == 0, told.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["step"] == 6
    logged = evaluations(run)[-1]
    assert logged.pop("step") == "6"
    assert {k: float(v) for k, v in logged.items() if v} == pytest.approx(
        {k: v for k, v in found["numbers"]["as it is"].items() if v is not None}, rel=1e-4
    )
    assert set(found["numbers"]) == {"as it is", *(f"{name} shuffled" for name in SHUFFLES)}
    again = evaluate(run / "checkpoint-000006", "--shards", shards, "--images", 8, "--json", tmp_path / "again.json")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again.json").read_text())["numbers"]["as it is"] == found["numbers"]["as it is"]
    assert "text to image r5" in told.stdout
    assert [line for line in told.stderr.splitlines() if not line.startswith("next: ")] == []


def test_all_images_only_with_a_warning(run: Path, shards: Path, tmp_path: Path):
    told = evaluate(run, "--shards", shards, "--all", "--images", 0, "--json", tmp_path / "all.json")
    assert told.returncode == 0
    assert "was trained on these shards" in told.stderr
    assert json.loads((tmp_path / "all.json").read_text())["images"] == 39


def test_foreign_shards_are_asked_about_as_a_whole(run: Path, tmp_path: Path):
    folder = write_folder(tmp_path / "foreign", make_samples(12))
    told = evaluate(run, "--shards", folder, "--images", 5, "--json", tmp_path / "foreign.json")
    assert told.returncode == 0, told.stderr
    assert json.loads((tmp_path / "foreign.json").read_text())["images"] == 11


def test_evaluations_change_no_step(run: Path, shards: Path, tmp_path: Path):
    out = tmp_path / "run"
    assert train("--shards", shards, "--out", out, *COMMON, "--eval-fraction", 0.3, "--eval-every", 1).returncode == 0
    assert rows(out) == rows(run)
    assert [row["step"] for row in evaluations(out)] == list("123456")
    assert evaluations(out)[2] == evaluations(run)[0]


def test_a_run_that_goes_on_makes_up_for_a_missing_evaluation(shards: Path, run: Path, tmp_path: Path):
    out = tmp_path / "run"
    flags = ("--eval-fraction", 0.3, "--eval-every", 3, "--checkpoint-every", 3, "--keep", 3)
    assert train("--shards", shards, "--out", out, *COMMON, *flags).returncode == 0
    lines = (out / "evaluation.csv").read_text().splitlines(keepends=True)
    (out / "evaluation.csv").write_text(lines[0])
    for file in (out / "checkpoint-000006").iterdir():
        file.unlink()
    (out / "checkpoint-000006").rmdir()
    done = train("--resume", out)
    assert done.returncode == 0, done.stderr
    assert (out / "evaluation.csv").read_text() == "".join(lines)


def test_a_share_that_is_too_small_names_one_that_is_not(corpus: Corpus):
    with pytest.raises(UsageError) as told:
        split(corpus, 0.001)
    enough = float(re.search(r"give --eval-fraction (\S+) or more", str(told.value))[1])
    assert len(np.unique(corpus.image[split(corpus, enough).held])) >= 2
    with pytest.raises(UsageError, match="two are needed"):
        split(corpus, enough - 0.01)


def test_what_cannot_be_evaluated_is_said_in_a_line(run: Path, shards: Path, tmp_path: Path):
    bad = {
        ("--eval-fraction", 0.3, "--eval-shards", shards): "give one of the two",
        ("--eval-fraction", 0.0001): "of 39 images with a text 0 is held out, two are needed; give --eval-fraction 0.",
        ("--eval-shards", tmp_path / "none"): f"--eval-shards {tmp_path / 'none'}: no such folder",
        ("--eval-shards", shards): "nothing is left to train on",
    }
    for flags, line in bad.items():
        done = train("--shards", shards, "--out", tmp_path / "out", *COMMON, *flags)
        assert done.returncode == 2
        assert line in error_line(done)
    wider = [
        replace(s, regions=replace(s.regions, features=np.pad(s.regions.features, ((0, 0), (0, 6)))))
        for s in make_samples(9)
    ]
    wide = write_folder(tmp_path / "wide", wider, feature_dim=30)
    told = evaluate(run, "--shards", wide)
    assert told.returncode == 2
    assert "30 features, the model is for 24" in error_line(told)
    told = evaluate(tmp_path)
    assert told.returncode == 2
    told = evaluate(run, "--objective", "oscar-plus")
    assert told.returncode == 2
    assert "the model tells polluted, matched" in error_line(told)
    plain = tmp_path / "plain"
    assert train("--shards", shards, "--out", plain, *COMMON).returncode == 0
    told = evaluate(plain)
    assert told.returncode == 2
    assert "--shards is missing" in error_line(told)


def test_another_share_is_another_run(run: Path, shards: Path):
    done = train("--shards", shards, "--out", run, *COMMON, "--eval-fraction", 0.2)
    assert done.returncode == 2
    assert "--eval-fraction 0.2: the run in --out began with 0.3" in error_line(done)
