"""A rule for tags leaves what a slow reference leaves, and the corpus knows when training sees something else."""

import dataclasses
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_shards import joined, write_tar
from foreign_shards import sample as foreign
from small_shards import CLASSES, make_samples, write_folder
from xxhash import xxh3_64_intdigest

from oscar_common.errors import UsageError
from oscar_common.sample import Sample
from oscar_common.settings import TAG_ORDERS, TAGS, Train
from oscar_shards.index import FIRST_SCHEMA
from oscar_shards.reindex import reindex
from oscar_train.batch import MAX_TEXT
from oscar_train.data.corpus import Corpus, open_corpus
from oscar_train.data.sources import open_source
from oscar_train.data.texts.phrases import CAPTION
from oscar_train.data.texts.tags import TagRule, tag_rule
from oscar_train.data.texts.tokens import Tokenizer

VOCABULARY = ("cat", "TRAFFIC light", "sofa", "unicorn", "ski")
TRUTH = ["Cat", "sofa", "sofa", "ski", " ", "traffic light", "größe", "CAT"]
UNSCORED = (8, 9)


def open_tagged(folder: Path, tokenizer: Tokenizer, cache: Path, **rule: object) -> Corpus:
    return open_corpus([open_source(str(folder), False)], tokenizer, cache, tags=TagRule(**rule))


def odd_samples() -> list[Sample]:
    """Tags with capitals and without a letter, scores in any order and equal ones, ground truth here and there."""
    rng = np.random.default_rng(5)
    samples = make_samples(16)
    for n, sample in enumerate(samples):
        tags = [*sample.regions.tags]
        tags[1::3] = [tag.title() for tag in tags[1::3]]
        tags[2::7] = ["" for _ in tags[2::7]]
        scores = rng.integers(0, 4, len(tags)) / 4
        regions = dataclasses.replace(sample.regions, tags=tags, scores=scores.tolist())
        truth = TRUTH[n % 5 :] if n % 3 == 0 else []
        samples[n] = dataclasses.replace(sample, regions=regions, gt_tags=truth)
    return samples


def rewrite_indexes(folder: Path, name: str, change) -> None:
    """Change a column of the indexes; drop it where `change` gives None."""
    for index in sorted(folder.glob("shard-*.parquet")):
        table = pq.read_table(index)
        place, values = table.schema.get_field_index(name), change(table)
        field = table.schema.field(name)
        table = table.remove_column(place)
        pq.write_table(table if values is None else table.add_column(place, field, pa.array(values, field.type)), index)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Sample]]:
    """The samples in shards; those of `UNSCORED` have lost their scores, as in files of others."""
    samples = odd_samples()
    folder = write_folder(tmp_path_factory.mktemp("odd") / "s", samples, per_shard=6)
    lost = {samples[n].key for n in UNSCORED}

    def without(table: pa.Table) -> list[list[float]]:
        keys, scores = table["key"].to_pylist(), table["scores"].to_pylist()
        return [[] if key in lost else some for key, some in zip(keys, scores, strict=True)]

    rewrite_indexes(folder, "scores", without)
    for n in UNSCORED:
        samples[n] = dataclasses.replace(samples[n], regions=dataclasses.replace(samples[n].regions, scores=[]))
    return folder, samples


def mixed(word: int) -> int:
    """The finalizer of splitmix64, in Python's integers."""
    word = (word + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def reference(image: Sample, rule: TagRule, tokenizer: Tokenizer) -> list[tuple[str, ...]]:
    """The tags of an image that the rule leaves, each as its tokens."""
    truth = rule.which == "ground-truth" and bool(image.gt_tags)
    chosen = [] if rule.which == "none" else image.gt_tags if truth else image.regions.tags
    scores = [0.0] * len(chosen) if truth or not image.regions.scores else image.regions.scores
    tags = [(place, tuple(tokenizer.backend.tokenize(tag))) for place, tag in enumerate(chosen)]
    tags = [(place, tokens) for place, tokens in tags if tokens]
    if rule.vocabulary is not None:
        known = [tuple(tokenizer.backend.tokenize(name)) for name in rule.vocabulary]
        tags = [(place, tokens) for place, tokens in tags if tokens in known]
    if rule.order == "score":
        tags.sort(key=lambda tag: -scores[tag[0]])
    if rule.order == "random":
        tags.sort(key=lambda tag: mixed(xxh3_64_intdigest(image.key.encode()) ^ mixed(tag[0])))
    left = [tokens for _, tokens in tags]
    if rule.dedupe:
        left = [tokens for n, tokens in enumerate(left) if tokens not in left[:n]]
    return left[: rule.budget]


def check(corpus: Corpus, samples: list[Sample], rule: TagRule) -> None:
    wanted = [reference(sample, rule, corpus.tokenizer) for sample in samples]
    rows = {int(corpus.image[t]): int(corpus.second_row[t]) for t in np.flatnonzero(corpus.kind == CAPTION)}
    assert set(rows) == {n for n, sample in enumerate(samples) if sample.texts}
    for image, row in rows.items():
        seen = corpus.tokenizer.backend.convert_ids_to_tokens(corpus.second[row].tolist())
        assert seen == [token for tag in wanted[image] for token in tag][:MAX_TEXT], (rule, image)
        for other, other_row in rows.items():
            equal = corpus.second_set[row] == corpus.second_set[other_row]
            assert equal == (set(wanted[image]) == set(wanted[other])), (rule, image, other)
    usable = [t for t, kind in enumerate(corpus.kind) if kind == CAPTION and wanted[corpus.image[t]]]
    assert corpus.pools[CAPTION].tolist() == usable


RULES = [
    TagRule(which=which, order=order, dedupe=dedupe, budget=budget, vocabulary=vocabulary)
    for which, order, dedupe, budget, vocabulary in product(
        TAGS[:2], TAG_ORDERS, (False, True), (None, 2), (None, VOCABULARY)
    )
]


@pytest.mark.parametrize("order", TAG_ORDERS)
def test_every_rule_leaves_what_the_reference_leaves(
    odd: tuple[Path, list[Sample]], tokenizer: Tokenizer, tmp_path: Path, order: str
):
    folder, samples = odd
    fingerprints = set()
    for rule in [rule for rule in RULES if rule.order == order]:
        corpus = open_tagged(folder, tokenizer, tmp_path, **vars(rule))
        check(corpus, samples, rule)
        assert corpus.ground_truth == (6 if rule.which == "ground-truth" else 0)
        fingerprints.add(corpus.fingerprint)
    assert len(fingerprints) == 16  # each knob does something to these samples, whatever the others are


def test_budgets_are_of_what_is_left_and_not_of_tokens(
    odd: tuple[Path, list[Sample]], tokenizer: Tokenizer, tmp_path: Path
):
    folder, samples = odd
    for budget in (1, 3, 11):
        rule = TagRule(budget=budget, dedupe=True, vocabulary=tuple(CLASSES[:7]))
        check(open_tagged(folder, tokenizer, tmp_path, **vars(rule)), samples, rule)


def test_the_random_order_is_the_same_on_every_machine(corpus: Corpus, shards: Path, tokenizer: Tokenizer, tmp_path):
    """Image 5 has 60 tags; the first of them in an order written down once."""
    shuffled = open_tagged(shards, tokenizer, tmp_path, order="random", budget=6)
    assert tokenizer.backend.decode(shuffled.second[5]) == ("hair drier pizza dog skateboarder hair drier person")
    assert shuffled.second[5].tolist() != corpus.second[5].tolist()[: len(shuffled.second[5])]


def test_without_tags_only_answers_are_left_and_nothing_may_be_left(
    shards: Path, samples: list[Sample], corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path
):
    bare = open_tagged(shards, tokenizer, tmp_path, which="none", vocabulary=("unicorn",))
    assert [len(pool) for pool in bare.pools] == [0, 10]
    assert {int(n) for n in bare.second.lengths[bare.second_row[bare.kind == CAPTION]]} == {0}
    for triple in bare.pools[1]:
        assert bare.second[bare.second_row[triple]].tolist() == corpus.second[corpus.second_row[triple]].tolist()
    captions = [dataclasses.replace(s, texts=[t for t in s.texts if t.kind == "caption"]) for s in samples[:9]]
    folder = write_folder(tmp_path / "captions", captions)
    empty = open_tagged(folder, tokenizer, tmp_path, which="none")
    assert [len(pool) for pool in empty.pools] == [0, 0]
    assert len(empty.second.values) == 0
    assert empty.second.padded(empty.second_row[:5], MAX_TEXT)[1].tolist() == [0] * 5


def test_the_fingerprint_changes_if_and_only_if_training_sees_something_else(
    shards: Path, corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path
):
    """In these shards scores fall, no tag is of the ground truth, and image 5 has most of the tags, 60."""
    rules = [
        {"budget": 60},
        {"order": "score"},
        {"which": "ground-truth"},
        {"vocabulary": tuple(name.upper() for name in CLASSES)},
    ]
    same = [open_tagged(shards, tokenizer, tmp_path, **rule) for rule in rules]
    assert {one.fingerprint for one in same} == {corpus.fingerprint}
    assert {one.ground_truth for one in same} == {0}
    rules = [{"which": "none"}, {"budget": 5}, {"dedupe": True}, {"order": "random"}, {"vocabulary": ("cat",)}]
    other = {open_tagged(shards, tokenizer, tmp_path, **rule).fingerprint for rule in rules}
    assert len(other - {corpus.fingerprint}) == 5
    assert len([path for path in (tmp_path / "corpus").iterdir() if path.is_dir()]) == 9
    again = open_tagged(shards, tokenizer, tmp_path, budget=5)
    assert again.fingerprint in other
    assert len([path for path in (tmp_path / "corpus").iterdir() if path.is_dir()]) == 9


def test_shards_with_indexes_from_before_the_ground_truth_are_read(
    shards: Path, samples: list[Sample], corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path
):
    older = write_folder(tmp_path / "older", samples)
    rewrite_indexes(older, "gt_tags", lambda table: None)
    assert pq.read_schema(older / "shard-000002.parquet").equals(FIRST_SCHEMA)
    assert open_tagged(older, tokenizer, tmp_path).fingerprint == corpus.fingerprint
    truth = open_tagged(older, tokenizer, tmp_path, which="ground-truth")
    assert (truth.fingerprint, truth.ground_truth) == (corpus.fingerprint, 0)
    newer = write_folder(tmp_path / "newer", [dataclasses.replace(s, gt_tags=["ski"]) for s in samples])
    sources = [open_source(str(folder), False) for folder in (older, newer)]
    both = open_corpus(sources, tokenizer, tmp_path, tags=TagRule(which="ground-truth"))
    assert both.ground_truth == len(samples)


def test_the_users_own_ground_truth_is_seen_once_the_tar_is_indexed(tokenizer: Tokenizer, tmp_path: Path):
    """The tar is the truth: what anybody's tool writes into KEY.json is in the index that is made of it."""
    write_tar(
        tmp_path / "s/a-000000.tar", joined(foreign(0), foreign(1, gt_tags=["ski", "Cat"]), foreign(2, gt_tags=[]))
    )
    reindex([tmp_path / "s"], None, 1)
    corpus = open_tagged(tmp_path / "s", tokenizer, tmp_path, which="ground-truth")
    seen = [tokenizer.backend.decode(corpus.second[row]) for row in corpus.second_row]
    assert seen == ["cat cat cat", "ski cat", "cat cat cat"]
    assert corpus.ground_truth == 1


def test_the_settings_become_a_rule(tmp_path: Path):
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeffcat\r\n\r\n  traffic light \nGröße\n".encode())
    settings = Train(tags="none", tag_budget=7, tag_dedupe=True, tag_order="score", tag_vocabulary=str(file))
    rule = tag_rule(settings)
    assert rule == TagRule(
        which="none", budget=7, dedupe=True, order="score", vocabulary=("cat", "traffic light", "Größe")
    )
    assert tag_rule(Train()) == TagRule()
    assert tag_rule(Train(variant="release")).which == "ground-truth"
    assert tag_rule(Train(objective="visualbert")).which == "none"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read \(No such file or directory\)"),
        (b"caf\xe9\n", r"line 1 is not UTF-8 \(byte 0xe9 after 'caf'\).* iconv -f latin1 -t utf-8 .*/names.txt"),
        (b"", "it has no tag"),
        (b" \n\r\n\t\n", "it has no tag"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused_in_one_line(tmp_path: Path, content: bytes | None, message: str):
    file = tmp_path / "names.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=rf"^--tag-vocabulary {file}: {message}.*$"):
        tag_rule(Train(tag_vocabulary=str(file)))
    with pytest.raises(UsageError, match=r"cannot be read \(Is a directory\)"):
        tag_rule(Train(tag_vocabulary=str(tmp_path)))


def test_a_vocabulary_that_leaves_no_tag_is_refused_and_no_corpus_is_left(
    shards: Path, tokenizer: Tokenizer, tmp_path: Path
):
    with pytest.raises(UsageError, match=r"^--tag-vocabulary: none of the \d+ tags of the images is in it .*'\w"):
        open_tagged(shards, tokenizer, tmp_path, vocabulary=("unicorn", "--"))
    assert not [path for path in (tmp_path / "corpus").iterdir() if path.is_dir()]
