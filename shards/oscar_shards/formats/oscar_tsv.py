"""Rows of Oscar's and VinVL's TSV files to samples: features with positions, labels, captions and questions."""

import json
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from oscar_common.sample import Attribute, Sample, Text
from oscar_shards.formats.fields import Floats, Ints, Refused, decode, whole
from oscar_shards.formats.lines import LineRows, Lines, Spans
from oscar_shards.formats.rows import make_sample
from oscar_shards.write import Reject

POSITION = 6  # numbers after the P features: x1/W, y1/H, x2/W, y2/H, w/W, h/H


@dataclass(frozen=True, kw_only=True)
class OscarRows(LineRows):
    """Images of one or several datasets with what belongs to each; see `oscar_shards.formats.rows.Rows`.

    A span of `labels` with file -1 stands for none. The texts of image n are those from starts[n] to starts[n + 1];
    a span of `answers` with file -1 makes a text a caption.
    """

    labels: Spans
    starts: Ints
    texts: Spans
    answers: Spans
    misfits: list[Reject]

    @property
    def num_texts(self) -> int:
        """Texts of all images."""
        return len(self.texts)

    def take(self, rows: Ints) -> "OscarRows":
        """Return some of the rows, with their texts."""
        counts = self.starts[rows + 1] - self.starts[rows]
        starts = np.concatenate([[0], np.cumsum(counts)])
        chosen = np.repeat(self.starts[rows] - starts[:-1], counts) + np.arange(starts[-1])
        ids, sources = ([some[n] for n in rows.tolist()] for some in (self.ids, self.sources))

        return replace(
            self,
            ids=ids,
            sources=sources,
            spans=self.spans[rows],
            labels=self.labels[rows],
            starts=starts,
            texts=self.texts[chosen],
            answers=self.answers[chosen],
            misfits=[],
        )

    def read(self, row: int, lines: Lines) -> tuple[Sample, list[Reject]]:
        """Read an image; its features are float32 [K, P].

        Raises:
            Refused: it is damaged, or nothing says how large the image is.
        """
        numbers = read_features(lines.read(self.spans[row]))
        place = self.labels[row]
        label = read_label(lines.read(place)) if place["file"] >= 0 else Label([], [], None)
        if label.size is None:
            raise Refused("no-size", "nothing says how large the image is: no image_h and image_w in predictions.tsv")

        objects, size = label.objects, label.size
        features, z = numbers[:, :-POSITION], numbers[:, -POSITION:]
        fits = len(objects) == len(numbers)
        boxes = _rects(objects) if fits else z[:, :4] * np.array([*size, *size], np.float32)
        tags, scores = _tags(objects) if fits else ([], [])
        attributes = _attributes(objects, self.vocabulary.attributes) if fits else []
        texts, refused = self._texts(row, lines)
        args = self.ids[row], self.sources[row], size

        return make_sample(*args, boxes, features, tags, scores, attributes, texts, _truth(label)), refused

    def _texts(self, row: int, lines: Lines) -> tuple[list[Text], list[Reject]]:
        texts, refused = [], []
        for n in range(self.starts[row], self.starts[row + 1]):
            try:
                texts.append(_text(lines, self.texts[n], self.answers[n], self.sources[row]))
            except Refused as error:
                refused.append(Reject(path=lines.name(self.texts[n]), reason=error.reason, message=str(error)))

        return texts, refused


def read_features(line: bytes) -> Floats:
    """Return the numbers [K, P + 6] of a row: id, K, ..., base64; or id, {"num_boxes": K, "features": base64}.

    Raises:
        Refused: it is damaged.
    """
    fields = line.split(b"\t")
    if len(fields) == 2 and fields[1].startswith(b"{"):
        content = _json(fields[1], "features")
        k, packed = content.get("num_boxes"), content.get("features")
        if type(k) is not int or k < 0 or not isinstance(packed, str):
            raise Refused("json", "features: no num_boxes and features in the JSON")
        field = packed.encode("utf-8", "replace")
    elif len(fields) >= 3:
        k, field = whole(fields[1], "number of boxes"), fields[-1]
    else:
        raise Refused("columns", f"{len(fields)} fields; a row has an id, the number of boxes and the features")

    size = len(field) // 4 * 3 - field[-2:].count(b"=")
    if not k and not field:
        return np.zeros((0, POSITION), np.float32)
    if not k or size % (4 * k) or size // (4 * k) <= POSITION:
        raise Refused("size", f"features: {size:,} bytes for {k} regions")

    numbers: Floats = decode(field, "<f4", size // 4, "features").reshape(k, -1)
    return numbers


class Label(NamedTuple):
    """A row of predictions: the objects detected, those of the ground truth, and width and height if it says them."""

    objects: list[dict[str, Any]]
    gt_objects: list[dict[str, Any]]
    size: tuple[int, int] | None


def read_label(line: bytes) -> Label:
    """Return a row of predictions.

    Raises:
        Refused: it is damaged.
    """
    fields = line.split(b"\t")
    if len(fields) < 2:
        raise Refused("label", "predictions: no second field")

    content = _json(fields[1], "predictions", list)
    record = {"objects": content} if isinstance(content, list) else content
    objects, gt_objects = (record.get(name, []) for name in ("objects", "gt_objects"))

    for some, name in ((objects, "objects"), (gt_objects, "gt_objects")):
        if not isinstance(some, list) or not all(isinstance(o, dict) for o in some):
            raise Refused("label", f"predictions: no list of {name}")

    size = (_side(record["image_w"]), _side(record["image_h"])) if {"image_h", "image_w"} <= record.keys() else None
    return Label(objects, gt_objects, size)


def _json(field: bytes, name: str, *others: type) -> Any:
    try:
        content = json.loads(field)
    except (ValueError, RecursionError) as error:
        raise Refused("json", f"{name}: {error}") from None

    if not isinstance(content, dict | list) or not isinstance(content, (dict, *others)):
        raise Refused("json", f"{name}: {type(content).__name__} instead of an object")

    return content


def _side(said: Any) -> int:
    if isinstance(said, bool) or not isinstance(said, int | float) or not float(said).is_integer():
        raise Refused("no-size", f"predictions: image_h or image_w is {str(said)[:40]}")
    return int(said)


def _rects(objects: list[dict[str, Any]]) -> Floats:
    try:
        return np.array([o["rect"] for o in objects], np.float32).reshape(len(objects), 4)
    except (LookupError, ValueError, TypeError):
        raise Refused("label", "predictions: an object's rect is not four numbers") from None


def _tags(objects: list[dict[str, Any]]) -> tuple[list[str], list[float]]:
    """Return classes and confidences; none if no object has a class."""
    tags = [o.get("class", "") for o in objects]
    scores = [o.get("conf", 0.0) for o in objects]
    if not all(isinstance(t, str) for t in tags) or not all(type(s) in (int, float) for s in scores):
        raise Refused("label", "predictions: an object's class is no text or its conf no number")
    return (tags, scores) if any(tags) else ([], [])


def _truth(label: Label) -> list[str]:
    """Return the classes of the ground truth; an object that has none names nothing."""
    tags = [o["class"] for o in label.gt_objects if o.get("class")]
    if not all(isinstance(t, str) for t in tags):
        raise Refused("label", "predictions: the class of one of gt_objects is no text")
    return tags


def _attributes(objects: list[dict[str, Any]], vocabulary: list[str]) -> list[list[Attribute]]:
    """Return the attributes of each region, if their numbers are known and any region has some."""
    number = {name: n for n, name in enumerate(vocabulary)}
    try:
        attributes = [
            [
                Attribute(id=number[name], name=name, score=float(score))
                for name, score in zip(o.get("attributes", ()), o.get("attr_scores", ()), strict=False)
                if name in number
            ]
            for o in objects
        ]
    except (TypeError, ValueError):
        raise Refused("label", "predictions: attributes and attr_scores are no lists of names and numbers") from None

    return attributes if any(attributes) else []


def _text(lines: Lines, span: np.void, answer: np.void, source: str) -> Text:
    fields = _decoded(lines.read(span), "corpus").split("\t")
    text = fields[2].strip() if len(fields) > 2 else ""
    if not text:
        raise Refused("text", "corpus: the text is empty")
    if answer["file"] < 0:
        return Text(kind="caption", source=source, id=str(span["line"] - 1), text=text)

    row = lines.read(answer).split(b"\t")
    labels = _json(row[1], "QA").get("labels") if len(row) > 1 else None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels) or not " ".join(labels):
        raise Refused("answer", "QA: no labels for the question")

    return Text(kind="qa", source=source, id=_decoded(row[0], "QA").strip(), question=text, answer=" ".join(labels))


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise Refused("encoding", f"{name}: not UTF-8") from None


def positions(boxes: Floats, width: int, height: int) -> npt.NDArray[np.float32]:
    """Return z [K, 6] of boxes [K, 4]: x1/W, y1/H, x2/W, y2/H, w/W, h/H."""
    corners = boxes / np.array([width, height, width, height], np.float32)
    return np.concatenate([corners, corners[:, 2:] - corners[:, :2]], 1)
