"""Questions and what people answered, as strings, in the order of a corpus' triples."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oscar_common.errors import UsageError
from oscar_shards.texts import read_overlays
from oscar_shards.values import KINDS
from oscar_train.data.sources import Source
from oscar_train.data.texts.phrases import QA
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.tasks.vqa_text import normalised

FLAG = "--annotations"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A triple of a corpus as a question. best: the answer that most people gave; people: all answers, of ten of them
    or of one; both normalised."""

    best: str
    people: tuple[str, ...]


def read_questions(
    sources: Sequence[Source], texts: Sequence[str], tokenizer: Tokenizer, people: dict[str, tuple[str, ...]]
) -> list[list[Question | None]]:
    """Return for each source its triples in the order of the corpus; None for a caption.

    Args:
        sources: whose indexes are read.
        texts: overlays, as --texts names them.
        tokenizer: texts without any token are no triples.
        people: the answers of all people, by the id of the question; of others the shards' own answer counts.
    """
    return [
        [triple for rows in _batches(source, texts) for triple in _triples(rows, tokenizer, people)]
        for source in sources
    ]


def _batches(source: Source, texts: Sequence[str]) -> Iterator[pa.StructArray]:
    """Yield the texts of a source's images."""
    batches = [rows for number in range(len(source.tars)) for rows in source.index(number)[1]]
    keys = pa.concat_arrays([rows.column("key") for rows in batches]) if batches else pa.array([], pa.string())
    overlays = read_overlays(keys, [Path(file) for file in texts]) if texts else []
    begin = 0

    for rows in batches:
        texts_of_images = rows.column("texts")
        for overlay in overlays:
            texts_of_images = overlay.laid_over(texts_of_images, begin)
        begin += len(rows)
        yield texts_of_images.flatten()


def _triples(
    texts: pa.StructArray, tokenizer: Tokenizer, people: dict[str, tuple[str, ...]]
) -> Iterator[Question | None]:
    kind, identity, text, question, answer = (
        pc.struct_field(texts, name) for name in ("kind", "id", "text", "question", "answer")
    )
    is_qa = pc.equal(kind, KINDS[QA])
    first = tokenizer(pc.if_else(is_qa, question, text).fill_null("").to_pylist(), 1).lengths > 0
    second = tokenizer(pc.if_else(is_qa, answer, "").fill_null("").to_pylist(), 1).lengths > 0
    qa = is_qa.to_numpy(zero_copy_only=False)
    identities, answers = identity.to_pylist(), answer.to_pylist()

    for row in np.flatnonzero(first & (second | ~qa)).tolist():
        if not qa[row]:
            yield None
            continue
        best = normalised(answers[row])
        yield Question(best=best, people=people.get(str(identities[row]), (best,)))


def read_people(files: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read what ten people answered, from VQA's annotations (.json), by the id of the question.

    Raises:
        UsageError: a file is missing, or is no such file.
    """
    people: dict[str, tuple[str, ...]] = {}
    for file in files:
        for entry in _annotations(Path(file)):
            people[str(entry["question_id"])] = tuple(normalised(str(answer["answer"])) for answer in entry["answers"])
    return people


def _annotations(path: Path) -> list[dict[str, Any]]:
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_bytes())["annotations"]
        entries[0]["question_id"], entries[0]["answers"][0]["answer"]
    except OSError as error:
        raise UsageError(f"{FLAG} {path}: {error.strerror}; give VQA's annotations, a .json file") from None
    except (ValueError, LookupError, TypeError):
        raise UsageError(
            f"{FLAG} {path}: no annotations of VQA (a list `annotations` with question_id and answers); give one like "
            "v2_mscoco_train2014_annotations.json"
        ) from None

    return entries
