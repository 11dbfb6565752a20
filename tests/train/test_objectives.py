"""The six presets against a slow reference in strings, written from the papers and the releases; and where texts that
replace others come from."""

import dataclasses
import itertools
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from small_shards import make_samples, write_folder

from oscar_common.sample import Sample, Text
from oscar_common.settings import Train
from oscar_train.batch import IGNORED
from oscar_train.data.corpus import Corpus
from oscar_train.data.sampling.negatives import TRIES, make_pools, replaced
from oscar_train.data.sampling.philox import SAMPLE, words
from oscar_train.data.sampling.text_pairs import Sides
from oscar_train.data.sampling.triples import _CANDIDATES, _PART, _WIDTH, assemble
from oscar_train.data.stream import open_stream
from oscar_train.data.texts.phrases import CAPTION
from oscar_train.data.texts.tags import TagRule
from oscar_train.data.texts.tokens import Tokenizer, load_tokenizer
from oscar_train.objectives import TABLE, Objective, choose_objective, choose_tags

ROWS = 400
# How often w and q are replaced, the labels of matched, wrong w and wrong q, and what replaces a text
PRESETS = {
    ("oscar", "paper"): (0, 0.5, (1, 0, 0), "typed"),
    ("oscar", "release"): (0, 0.5, (0, 1, 1), "lines"),
    ("oscar-plus", "paper"): (0.25, 0.25, (0, 1, 2), "any"),
    ("oscar-plus", "release"): (0.25, 0.25, (0, 2, 1), "any"),
    ("visualbert", "paper"): (0.5, 0, (0, 1, 1), "typed"),
    ("visualbert", "release"): (0.5, 0, (1, 0, 0), "typed"),
}


@dataclasses.dataclass
class Triple:
    kind: str
    w: list[str]
    q: list[str]
    tags: list[str] | None  # of which q was made
    image: str


def triples_of(samples: list[Sample], tokenizer: Tokenizer, with_tags: bool) -> list[Triple]:
    split = tokenizer.backend.tokenize
    found = []
    for sample in samples:
        tags = sample.regions.tags if with_tags else []
        for each in sample.texts:
            qa = each.kind == "qa"
            w = split(each.question if qa else each.text)[:33]
            q = split(each.answer if qa else " ".join(tags))[:32]
            found.append(Triple(each.kind, w, q, None if qa else tags, sample.key))
    return found


def uniform(word: int) -> float:
    return (word >> 11) / 2**53


def shortened(w: list[str], q: list[str]) -> tuple[list[str], list[str]]:
    w, q = w[:33] if not q else [*w], [*q]
    while q and len(w) + len(q) > 32:
        (w if len(w) > len(q) else q).pop()
    return w, q


def identical(some: list[str], others: list[str]) -> bool:
    return set(some) == set(others)


def candidates_of(triple: Triple, triples: list[Triple], side: str, negatives: str) -> list[Triple]:
    """Return the triples among which another text is looked for, each as often as it is to be found."""
    if side == "q" and negatives != "lines":
        triples = [t for t in triples if t.q]
    return [t for t in triples if negatives != "typed" or t.kind == triple.kind]


def fits(triple: Triple, other: Triple, side: str, from_w: bool) -> bool:
    new = other.w if from_w else other.q
    if not new or other.image == triple.image:
        return False
    if side == "q" and not from_w and triple.tags and other.tags and {*triple.tags} == {*other.tags}:
        return False
    if side == "w":
        seen, seen_new = shortened(triple.w, triple.q)[0], shortened(new, triple.q)[0]
    else:
        seen, seen_new = shortened(triple.w, triple.q)[1], shortened(triple.w, new)[1]
    own = triple.w if side == "w" else triple.q
    return not identical(own, new) and not identical(seen, seen_new)


def reference(
    objective: Objective,
    name: tuple[str, str],
    triples: list[Triple],
    row: Triple,
    drawn: list[int],
    vocabulary: list[str],
) -> tuple[list[str], list[str], int]:
    """Return the tokens as the model sees them, as they were, and the label."""
    wrong_w, wrong_q, labels, negatives = PRESETS[name]
    chance, label, w, q = uniform(drawn[105]), labels[0], row.w, row.q
    if chance < wrong_w + wrong_q:
        side = "w" if chance < wrong_w or not q else "q"
        pool = candidates_of(row, triples, side, negatives)
        for word in drawn[106:122]:
            other = pool[int(uniform(word) * len(pool))]
            from_w = side == "w" or (negatives == "lines" and word % 2 == 1)
            if fits(row, other, side, from_w):
                label = labels[1] if side == "w" else labels[2]
                new = other.w if from_w else other.q
                w, q = (new, q) if side == "w" else (w, new)
                break
    w, q = shortened(w, q)
    plain = ["[CLS]", *w, "[SEP]", *([*q, "[SEP]"] if q else [])]
    places = [*range(1, len(w) + 1), *range(len(w) + 2, len(w) + 2 + len(q))]
    return masked(objective, name[1], plain, places, drawn, vocabulary), plain, label


def masked(
    objective: Objective, variant: str, plain: list[str], places: list[int], drawn: list[int], vocabulary: list[str]
) -> list[str]:
    """Return the tokens with masks; where a masked token stays, a ! behind it."""
    units: list[list[int]] = []
    for n in places:
        if objective.whole_words and plain[n].startswith("##") and n - 1 in places:
            units[-1].append(n)
        else:
            units.append([n])
    chances = [uniform(drawn[unit[0]]) for unit in units]
    if variant == "release":
        chosen = [unit for unit, chance in zip(units, chances, strict=True) if chance < 0.15]
    else:
        count = min(len(units), max(1, math.floor(0.15 * len(units) + uniform(drawn[123]))))
        chosen = [units[n] for n in np.argsort(chances)[:count]]
    seen = [*plain]
    for n in itertools.chain(*chosen):
        action = uniform(drawn[35 + n])
        if action < 0.8:
            seen[n] = "[MASK]"
        elif action < 0.9:
            seen[n] = vocabulary[drawn[70 + n] % len(vocabulary)]
        seen[n] += "!"
    return seen


def random_tokens(tokenizer: Tokenizer, variant: str) -> list[str]:
    """Return what a masked token may become, in the vocabulary's order."""
    tokens = sorted(tokenizer.backend.get_vocab(), key=tokenizer.backend.get_vocab().get)
    return [t for t in tokens if variant == "release" or not (t[0] == "[" and t[-1] == "]")]


@pytest.fixture(scope="module")
def bare(shards: Path, tokenizer: Tokenizer) -> Corpus:
    """The same without tags."""
    with open_stream([str(shards)], batch_size=2, tokenizer=tokenizer, tags=TagRule(which="none")) as stream:
        return stream.corpus


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("name", PRESETS, ids="-".join)
def test_a_preset_is_what_the_reference_says(
    samples: list[Sample],
    corpus: Corpus,
    bare: Corpus,
    tokenizer: Tokenizer,
    name: tuple[str, str],
    tags: bool,
    whole_words: bool,
):
    objective = dataclasses.replace(TABLE[name], whole_words=whole_words)
    triples = triples_of(samples, tokenizer, tags)
    mine = corpus if tags else bare
    assert len(triples) == len(mine)
    rows = np.random.default_rng(5).integers(len(triples), size=ROWS)
    batch = assemble(mine, make_pools(mine, [Fraction(1)], objective), objective, rows, seed=7, epoch=1, place=30)
    drawn = words(7, SAMPLE, 1, 30, ROWS, _WIDTH).tolist()
    to_tokens, vocabulary = tokenizer.backend.convert_ids_to_tokens, random_tokens(tokenizer, name[1])
    for n, row in enumerate(rows):
        seen, plain, label = reference(objective, name, triples, triples[row], drawn[n], vocabulary)
        length = int(batch.attention_mask[n].sum())
        ids, labels = batch.input_ids[n, :length], batch.mlm_labels[n, :length]
        found = [token if y == IGNORED else f"{token}!" for token, y in zip(to_tokens(ids), labels, strict=True)]
        assert found == seen, n
        assert to_tokens(np.where(labels == IGNORED, ids, labels)) == plain
        assert batch.match_labels[n] == label
        assert (batch.mlm_labels[n, length:] == IGNORED).all()
        first = plain.index("[SEP]") + 1
        assert batch.token_type_ids[n].tolist() == [0] * first + [1] * (length - first) + [0] * (35 - length)


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("name", PRESETS, ids="-".join)
def test_labels_are_as_frequent_as_the_preset_says(corpus: Corpus, bare: Corpus, name: tuple[str, str], tags: bool):
    wrong_w, wrong_q, labels, _ = PRESETS[name]
    mine, objective, size = corpus if tags else bare, TABLE[name], 20_000
    rows = np.resize(np.arange(len(mine)), size)
    batch = assemble(mine, make_pools(mine, [Fraction(1)], objective), objective, rows, seed=3, epoch=0, place=0)
    no_q = np.mean(mine.second.lengths[mine.second_row[rows]] == 0)  # whose w is replaced for either
    rates = (1 - wrong_w - wrong_q, wrong_w + wrong_q * no_q, wrong_q * (1 - no_q))
    for label in {*labels}:
        expected = size * sum(rate for rate, of in zip(rates, labels, strict=True) if of == label)
        assert likely((batch.match_labels == label).sum(), expected)


@pytest.mark.parametrize("name", PRESETS, ids="-".join)
def test_the_table_says_what_the_papers_and_releases_do(name: tuple[str, str]):
    wrong_w, wrong_q, labels, negatives = PRESETS[name]
    objective = choose_objective(Train(objective=name[0], variant=name[1]))
    assert (objective.wrong_w, objective.wrong_q, objective.negatives) == (wrong_w, wrong_q, negatives)
    assert tuple(objective.label(part) for part in ("matched", "wrong w", "wrong q")) == labels
    assert len(objective.classes) == len(set(labels))


def test_settings_override_a_preset():
    settings = Train(objective="oscar-plus", variant="release", negatives="typed", whole_word_masking=True, tags="none")
    objective = choose_objective(settings)
    assert (objective.negatives, objective.whole_words, objective.exact) == ("typed", True, False)
    assert choose_tags(settings) == "none"
    assert choose_tags(Train(variant="release")) == "ground-truth"
    assert choose_tags(Train()) == "detected"
    assert choose_tags(Train(objective="visualbert", variant="release")) == "none"


def drawn_sides(corpus: Corpus, objective: Objective, triples: np.ndarray) -> Sides:
    drawn = words(11, SAMPLE, 0, 0, len(triples), _WIDTH)
    pools = make_pools(corpus, [Fraction(1)], objective)
    return replaced(corpus, pools, objective, triples, drawn[:, _PART], drawn[:, _CANDIDATES])


def likely(count: int, expected: float) -> bool:
    """Whether a count of independent events may be that far off; five standard deviations, at most those of Poisson."""
    return abs(count - expected) <= 5 * math.sqrt(expected) + 1e-9


@pytest.mark.parametrize("negatives", ["typed", "any", "lines"])
@pytest.mark.parametrize("tags", [True, False])
def test_what_replaces_a_text_is_drawn_evenly_from_all_that_fits(
    samples: list[Sample], corpus: Corpus, bare: Corpus, tokenizer: Tokenizer, negatives: str, tags: bool
):
    """By kind of the triple, side, kind of the other, and its side; and by triple."""
    triples = triples_of(samples, tokenizer, tags)
    objective = dataclasses.replace(TABLE["oscar-plus", "paper"], negatives=negatives)
    times = 400
    expected: Counter[tuple[str, str, str, bool]] = Counter()
    each = np.zeros(len(triples))
    for triple in triples:
        for side in ("w", "q") if triple.q else ("w", "w"):
            found = [
                (other, from_w)
                for other in candidates_of(triple, triples, side, negatives)
                for from_w in ([True] if side == "w" else [False, True] if negatives == "lines" else [False])
            ]
            good = [fits(triple, other, side, from_w) for other, from_w in found]
            share = sum(good) / len(found)
            some = times / 4 * (1 - (1 - share) ** TRIES) / sum(good)
            for (other, from_w), fitting in zip(found, good, strict=True):
                if fitting:
                    expected[triple.kind, side, other.kind, from_w] += some
                    each[triples.index(other)] += some
    mine = corpus if tags else bare
    rows = np.repeat(np.arange(len(triples)), times)
    sides = drawn_sides(mine, objective, rows)
    counts: Counter[tuple[str, str, str, bool]] = Counter()
    for row, w, q, lent in zip(rows, sides.w, sides.q, sides.lent, strict=True):
        assert row in (w, q)
        if w != row:
            counts[triples[row].kind, "w", triples[w].kind, True] += 1
        elif q != row:
            counts[triples[row].kind, "q", triples[q].kind, bool(lent)] += 1
    assert counts.keys() == expected.keys()
    assert all(likely(counts[which], expected[which]) for which in expected), (counts, expected)
    others = np.where(sides.w != rows, sides.w, sides.q)
    by_triple = np.bincount(others[others != rows], minlength=len(triples))
    assert all(map(likely, by_triple, each))


@pytest.fixture(scope="module")
def twins(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Images whose texts and tags are mostly the same: in another order, or up to where they are cut."""
    chance = np.random.default_rng(2)
    numerals = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "red", "blue"]
    many = [" ".join(numerals[n : n + 9]) for n in range(5)]  # 45 tokens; only 32 are kept
    samples = []
    for n, sample in enumerate(make_samples(110)[40:]):
        count = len(sample.regions.tags)
        tags = [["cat", "dog", "sofa"], ["zebra", "hair drier"], many[:count], many[:count]][n % 4]
        tags = chance.permutation([*tags, *chance.choice(tags, max(0, count - len(tags)))])[:count].tolist()
        short = f"A {n % 2} dog and a cat.", f"A cat and a {n % 2} dog."
        long = " ".join(chance.permutation(2 * numerals)), " ".join(["far away"] * 14) + f" {n % 7}"
        texts = [Text(kind="caption", source="c", id=str(i), text=text) for i, text in enumerate([*short, *long])]
        for i, answer in enumerate([["yes", "no", "dog cat sofa", "Cat, dog, sofa"][n % 4], "Yes yes", long[0]]):
            texts.append(Text(kind="qa", source="q", id=f"q{i}", question=f"{long[i % 2]}?", answer=answer))
        regions = dataclasses.replace(sample.regions, tags=tags)
        samples.append(dataclasses.replace(sample, regions=regions, texts=texts))
    shards = write_folder(tmp_path_factory.mktemp("twins") / "shards", samples)
    with open_stream([str(shards)], batch_size=2, tokenizer=tokenizer) as stream:
        return stream.corpus


@pytest.mark.parametrize("negatives", ["typed", "any", "lines"])
def test_no_text_is_replaced_by_one_that_says_the_same(twins: Corpus, negatives: str):
    objective = dataclasses.replace(TABLE["oscar-plus", "release"], negatives=negatives)
    rows = np.resize(np.arange(len(twins)), 6000)
    sides = drawn_sides(twins, objective, rows)
    changed = 0
    for row, w, q, lent in zip(rows, sides.w, sides.q, sides.lent, strict=True):
        if (w, q) == (row, row):
            continue
        changed += 1
        own = twins.first[row].tolist(), twins.second[twins.second_row[row]].tolist()
        other = twins.first[w].tolist(), (twins.first[q] if lent else twins.second[twins.second_row[q]]).tolist()
        side = 0 if w != row else 1
        assert twins.image[w if side == 0 else q] != twins.image[row]
        assert {*own[side]} != {*other[side]}
        assert {*shortened(*own)[side]} != {*shortened(*other)[side]}
        if side == 1 and not lent and twins.kind[row] == twins.kind[q] == CAPTION:  # also beyond what is kept
            assert twins.second_set[twins.second_row[row]] != twins.second_set[twins.second_row[q]]
    assert changed > 1500


def test_where_all_texts_are_alike_everything_stays_matched(twins: Corpus, tokenizer: Tokenizer):
    yes = {*tokenizer.backend.encode("yes", add_special_tokens=False)}
    answers = np.flatnonzero([{*twins.second[row].tolist()} == yes for row in twins.second_row])
    assert len(np.unique(twins.image[answers])) > 60
    alike = dataclasses.replace(twins, pools=(twins.pools[CAPTION], answers))
    rows = np.resize(answers, 1000)
    assert (drawn_sides(alike, TABLE["oscar", "paper"], rows).q == rows).all()


def test_random_tokens_of_the_paper_are_words(tokenizer: Tokenizer):
    names = tokenizer.backend.convert_ids_to_tokens(tokenizer.words.tolist())
    assert len(names) == 30522 - 5 - 994  # [PAD], [UNK], [CLS], [SEP], [MASK], and [unused0] to [unused993]
    assert {"[", "]", "dog", "##s"} < {*names}
    assert not any(name.startswith("[") and name.endswith("]") for name in names)
    assert [tokenizer.continues[tokenizer.backend.convert_tokens_to_ids(name)] for name in ("dog", "##s")] == [0, 1]


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One whose vocabulary has no parts of words."""
    folder = tmp_path_factory.mktemp("vocabulary")
    entries = ["[PAD]", "the", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "[extra 3]", "dog"]
    (folder / "vocab.txt").write_text("\n".join(entries) + "\n")
    return load_tokenizer(folder)


def test_a_vocabulary_without_parts_of_words_has_only_words(other_tokenizer: Tokenizer):
    assert not other_tokenizer.continues.any()
    assert len(other_tokenizer.continues) == other_tokenizer.size == 9
    assert other_tokenizer.words.tolist() == [1, 6, 8]
