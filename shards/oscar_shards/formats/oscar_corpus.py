"""Where the images of an Oscar corpus lie: its YAML, the features of each dataset, their labels, and the texts."""

from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from oscar_common.errors import UsageError, nearest, shorten
from oscar_common.text_files import read_text
from oscar_shards.formats.fields import Ints, Vocabulary
from oscar_shards.formats.lines import NAME_LIMIT, SPAN, Spans, index_lines
from oscar_shards.formats.oscar_tsv import OscarRows
from oscar_shards.write import Reject

YAML = "corpus.yaml"
FEATURES = "features.tsv"
LABELS = ("predictions_gt.tsv", "predictions.tsv")
QA = "QA_fileB.tsv"
RENAMED = {"cc": "googlecc"}  # what a corpus calls it
NONE = np.zeros(1, SPAN)
NONE["file"] = -1


@dataclass(kw_only=True)
class _Dataset:
    """A dataset: files with features, folders in which labels are looked for, and then what was found in them."""

    name: str
    source: str
    features: list[Path]
    folders: list[Path]
    rows: dict[str, int] = field(default_factory=dict)  # the number of each image by its id
    answers: dict[str, int] = field(default_factory=dict)  # the number of each answer by its id


@dataclass(kw_only=True)
class _Parsed:
    """What is gathered on the way, in the order of the images."""

    paths: list[Path] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    spans: list[Spans] = field(default_factory=list)
    labels: list[Spans] = field(default_factory=list)
    answers: list[Spans] = field(default_factory=lambda: [NONE])
    misfits: list[Reject] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def index(self, path: Path) -> tuple[Spans, list[str]]:
        """Return spans and ids of a file's lines."""
        self.paths.append(path)
        return index_lines(path, len(self.paths) - 1)


def read_rows(path: Path, source: str | None, vocabulary: Vocabulary, with_texts: bool) -> OscarRows:
    """Find the images that a YAML names; or those of a features.tsv or its folder, without texts.

    Raises:
        UsageError: a file is missing or is not what it should be.
    """
    datasets, corpus = _datasets(path, source)
    parsed = _Parsed()
    for dataset in datasets:
        _index_dataset(parsed, dataset, with_texts and corpus is not None)

    count = len(parsed.ids)
    texts = answers = np.zeros(0, SPAN)
    owners = np.zeros(0, np.int64)
    if corpus is not None and with_texts:
        owners, texts, answers = _index_corpus(parsed, corpus, datasets)

    order = np.argsort(owners, kind="stable")
    return OscarRows(
        paths=parsed.paths,
        ids=parsed.ids,
        sources=parsed.sources,
        spans=np.concatenate([np.zeros(0, SPAN), *parsed.spans]),
        labels=np.concatenate([np.zeros(0, SPAN), *parsed.labels]),
        starts=np.searchsorted(owners[order], np.arange(count + 1)),
        texts=texts[order],
        answers=answers[order],
        vocabulary=vocabulary,
        misfits=parsed.misfits,
        notes=parsed.notes,
    )


def _datasets(path: Path, source: str | None) -> tuple[list[_Dataset], Path | None]:
    """Return the datasets, and the corpus if there is one."""
    if path.suffix in (".yaml", ".yml") or (path / YAML).is_file():
        return _read_yaml(path if path.is_file() else path / YAML, source)

    file = path / FEATURES if path.is_dir() else path
    if not file.is_file():
        expected = f"{YAML} or {FEATURES} in it" if path.is_dir() else "such file"
        raise UsageError(f"FROM {path}: no {expected}; give a corpus' .yaml, a {FEATURES}, or its folder")

    name = file.resolve().parent.name if file.name == FEATURES else file.stem
    return [_Dataset(name=name, source=source or name, features=[file], folders=[])], None


def _read_yaml(path: Path, source: str | None) -> tuple[list[_Dataset], Path | None]:
    try:
        content = yaml.safe_load(read_text(path, "FROM"))
    except FileNotFoundError:
        raise UsageError(f"FROM {path}: no such file; give a corpus' .yaml, a {FEATURES}, or its folder") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"FROM {path}: cannot be read as YAML: {shorten(str(error))}") from None

    if not isinstance(content, dict) or not isinstance(content.get("corpus"), str) or not content["corpus"]:
        raise UsageError(f"FROM {path}: no key `corpus` in it; a corpus' YAML has datasets' names there, joined by _")

    features, labels = (_paths(content, key, path) for key in ("image_feature_path", "image_label_path"))
    names = content["corpus"].split("_")
    for name in names:
        if name not in features:
            raise UsageError(f"FROM {path}: image_feature_path has no {name!r}, a dataset{nearest(name, features)}")

    if source and len(names) > 1:
        raise UsageError(f"--source {source}: {path} has {len(names)} datasets, which keep their names; leave it out")

    datasets = [
        _Dataset(
            name=name,
            source=source or name,
            features=_features(path, features[name]),
            folders=[labels[name]] if name in labels else [],
        )
        for name in names
    ]
    corpus = content.get("corpus_file")
    if corpus is not None and not (path.parent / str(corpus)).is_file():
        raise UsageError(f"FROM {path}: no file {corpus!r}, its corpus_file, beside it; change that key")

    return datasets, None if corpus is None else path.parent / str(corpus)


def _paths(content: dict[str, Any], key: str, path: Path) -> dict[str, Path]:
    listed = content.get(key) or {}
    if not isinstance(listed, dict) or not all(isinstance(p, str) for p in listed.values()):
        raise UsageError(f"FROM {path}: {key} is no mapping of datasets to folders")
    return {str(name): path.parent / place for name, place in listed.items()}  # absolute ones stay


def _features(path: Path, folder: Path) -> list[Path]:
    """Return the features of a dataset: one file, or one in each chunk's folder."""
    if (folder / FEATURES).is_file():
        return [folder / FEATURES]
    chunks = sorted(folder.glob(f"*/{FEATURES}"), key=lambda p: (len(p.parent.name), p.parent.name))
    if not chunks:
        raise UsageError(f"FROM {path}: no {FEATURES} in {folder} or its folders; change image_feature_path")
    return chunks


def _index_dataset(parsed: _Parsed, dataset: _Dataset, with_answers: bool) -> None:
    of_folder = _labels(parsed, dataset.folders)
    for features in dataset.features:
        spans, ids = parsed.index(features)
        of_each, number_of = of_folder or _labels(parsed, [features.parent]) or (NONE, {})
        if not number_of:
            parsed.notes.append(f"{features}: no {' or '.join(LABELS)} for it; the size of its images is unknown")

        for number, id in enumerate(ids, len(parsed.ids)):
            dataset.rows.setdefault(id, number)

        parsed.ids.extend(ids)
        parsed.sources.extend([dataset.source] * len(ids))
        parsed.spans.append(spans)
        parsed.labels.append(of_each[np.array([number_of.get(id, 0) for id in ids], np.int64)])

    for folder in dataset.folders if with_answers else ():
        if (folder / QA).is_file():
            spans, ids = parsed.index(folder / QA)
            dataset.answers.update({id: n for n, id in enumerate(ids, sum(map(len, parsed.answers)))})
            parsed.answers.append(spans)


def _labels(parsed: _Parsed, folders: list[Path]) -> tuple[Spans, dict[str, int]] | None:
    """Return the spans of labels after `NONE`, and each image's among them, from the first file that there is."""
    for folder in folders:
        for name in LABELS:
            if (folder / name).is_file():
                spans, ids = parsed.index(folder / name)
                return np.concatenate([NONE, spans]), {id: len(ids) - n for n, id in enumerate(reversed(ids))}
    return None


def _index_corpus(parsed: _Parsed, corpus: Path, datasets: list[_Dataset]) -> tuple[Ints, Spans, Spans]:
    """Return for each text the number of its image, its span, and the span of its answer."""
    by_name = {d.name: d for d in datasets}
    spans = parsed.index(corpus)[0]
    kept = array("q")  # of each: text, image, answer
    num_skipped = 0

    with corpus.open("rb") as handle:
        for number, (begin, end) in enumerate(zip(spans["begin"].tolist(), spans["end"].tolist(), strict=True)):
            handle.seek(begin)
            head = handle.read(min(end - begin, 2 * NAME_LIMIT)).decode("utf-8", "replace")
            image, label, *rest = [*head.split("\t", 2), "", ""]
            name = image.partition("_")[0]
            dataset = by_name.get(RENAMED.get(name, name))
            if dataset is None and label and rest[0]:
                num_skipped += 1
                continue

            row, answer, fault = _resolve(dataset, image.strip().split("_"), label.strip().split("_"))
            if fault:
                place = f"{corpus.name}:{spans[number]['line']}"
                parsed.misfits.append(Reject(path=place, reason="corpus", message=f"{image.strip()[:80]}: {fault}"))
            else:
                kept.extend((number, row, answer))

    if num_skipped:
        parsed.notes.append(
            f"{num_skipped:,} rows of {corpus.name} are of datasets that `corpus` does not name: left out"
        )

    texts, owners, answers = np.array(kept, np.int64).reshape(-1, 3).T
    return owners, spans[texts], np.concatenate(parsed.answers)[answers]


def _resolve(dataset: _Dataset | None, image: list[str], label: list[str]) -> tuple[int, int, str]:
    """Return the numbers of a corpus row's image and answer (0: a caption), and what is wrong with the row."""
    if dataset is None or label == [""]:
        return 0, 0, "not three fields: image, label, text"

    row = dataset.rows.get(image[-1])
    if row is None:
        return 0, 0, f"no features of image {image[-1]!r}"
    if "qa" not in label:
        return row, 0, "" if label[-1] == image[-1] else "image and label are of two images"

    answer = dataset.answers.get(label[-1])
    if answer is None:
        return row, 0, f"no answer {label[-1]!r} in {QA}"

    return row, answer, "" if label[-2] == image[-1] else "image and answer are of two images"
