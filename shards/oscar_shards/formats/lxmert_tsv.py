"""The TSV files of airsplay's LXMERT and of Peter Anderson's bottom-up attention: a row an image, arrays in base64."""

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from oscar_common.errors import UsageError
from oscar_common.sample import Attribute, Sample
from oscar_shards.formats.fields import (
    Ints,
    Refused,
    Vocabulary,
    attributes_of,
    decode,
    encode,
    free_id,
    names_of,
    numbers_of,
    plain,
    whole,
)
from oscar_shards.formats.lines import LineRows, Lines, index_lines
from oscar_shards.formats.rows import make_sample
from oscar_shards.write import Reject

FILE = "features.tsv"
LXMERT = (
    "img_id",
    "img_h",
    "img_w",
    "objects_id",  # int64 [K]
    "objects_conf",  # float32 [K]
    "attrs_id",  # int64 [K]
    "attrs_conf",  # float32 [K]
    "num_boxes",
    "boxes",  # float32 [K, 4], xyxy
    "features",  # float32 [K, P]
)
BOTTOM_UP = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
ID_CHARACTERS = "A-Za-z0-9._/-"  # in an id of an export; others are escaped


@dataclass(frozen=True, kw_only=True)
class TsvRows(LineRows):
    """The rows of one TSV; see `oscar_shards.formats.rows.Rows`."""

    columns: tuple[str, ...]
    num_texts: int = 0
    misfits: list[Reject] = field(default_factory=list)

    def take(self, rows: Ints) -> "TsvRows":
        """Return some of the rows."""
        ids, sources = ([some[n] for n in rows.tolist()] for some in (self.ids, self.sources))
        return replace(self, ids=ids, sources=sources, spans=self.spans[rows])

    def read(self, row: int, lines: Lines) -> tuple[Sample, list[Reject]]:
        """Read an image; its features are float32 [K, P].

        Raises:
            Refused: it is damaged.
        """
        fields = lines.read(self.spans[row]).split(b"\t")
        if len(fields) != len(self.columns):
            expected = f"{len(self.columns)}: {', '.join(self.columns)}"
            raise Refused("columns", f"{len(fields)} fields; the format has {expected}")

        return _sample(
            dict(zip(self.columns, fields, strict=True)), self.ids[row], self.sources[row], self.vocabulary
        ), []


def _sample(fields: dict[str, bytes], id: str, source: str, vocabulary: Vocabulary) -> Sample:
    k = whole(fields["num_boxes"], "num_boxes")
    width, height = (whole(fields[b if b in fields else a], b) for a, b in (("image_w", "img_w"), ("image_h", "img_h")))
    boxes = decode(fields["boxes"], "<f4", 4 * k, "boxes").reshape(k, 4)
    size = len(fields["features"]) // 4 * 3 - fields["features"][-2:].count(b"=")
    if not k or size % (4 * k):
        raise Refused("size", f"features: {size:,} bytes for {k} regions")

    features = decode(fields["features"], "<f4", size // 4, "features").reshape(k, -1)
    tags: list[str] = []
    scores: list[float] = []
    attributes: list[list[Attribute]] = []
    if vocabulary.classes:
        numbers = decode(fields["objects_id"], "<i8", k, "objects_id")
        tags = names_of(numbers, vocabulary.classes, "class")
        scores = decode(fields["objects_conf"], "<f4", k, "objects_conf").tolist() if tags else []
        numbers, surely = (
            decode(fields[f"attrs_{n}"], d, k, f"attrs_{n}") for n, d in (("id", "<i8"), ("conf", "<f4"))
        )
        attributes = attributes_of(numbers, surely, vocabulary.attributes)

    return make_sample(id, source, (width, height), boxes, features, tags, scores, attributes, [])


def read_rows(path: Path, format: str, source: str | None, vocabulary: Vocabulary) -> TsvRows:
    """Find the rows of a TSV, or of FILE in a folder.

    Raises:
        UsageError: it is missing or empty.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            f"FROM {path}: no {f'{FILE} in it' if path.is_dir() else 'such file'}; give {format}'s TSV file"
        )

    spans, ids = index_lines(file, 0)
    lxmert = format == "lxmert"
    return TsvRows(
        paths=[file],
        columns=LXMERT if lxmert else BOTTOM_UP,
        ids=ids,
        sources=[source or (path if path.is_dir() else file).stem] * len(ids),
        spans=spans,
        vocabulary=vocabulary if lxmert else Vocabulary([], []),
        notes=[] if lxmert else ["bottom-up files have no tags: the samples have regions without them"],
    )


class TsvWriter:
    """Writes samples as rows of FILE in a folder; an image without regions gets none, as the readers fail on it.

    `stack` closes the file if that fails.
    """

    def __init__(self, folder: Path, format: str, vocabulary: Vocabulary, stack: ExitStack) -> None:
        self._file = stack.enter_context((folder / FILE).open("wb"))
        self._columns = LXMERT if format == "lxmert" else BOTTOM_UP
        self._vocabulary = vocabulary
        self._ids: set[str] = set()
        self._without = self._texts = 0

    def add(self, sample: Sample) -> tuple[str, str]:
        """Write a sample and return the file and id that it has there; both are empty if it has none."""
        self._texts += len(sample.texts)
        if not len(sample.regions.boxes):
            self._without += 1
            return "", ""

        image = sample.image
        escaped = plain(image.id, ID_CHARACTERS)
        id = free_id(self._ids, escaped, plain(f"{image.source}/{image.id}", ID_CHARACTERS), sample.key)
        self._ids.add(id)
        fields = {"id": id.encode(), "num_boxes": b"%d" % len(sample.regions.boxes)}
        fields |= {"w": b"%d" % image.width, "h": b"%d" % image.height}
        fields |= {n: encode(a, a.dtype.str) for n, a in numbers_of(sample.regions, self._vocabulary).items()}
        fields |= {"boxes": encode(sample.regions.boxes, "<f4"), "features": encode(sample.regions.features, "<f4")}
        short = (name.removeprefix("image_").removeprefix("img_") for name in self._columns)
        self._file.write(b"\t".join(fields[name] for name in short) + b"\n")

        return FILE, id

    def close(self) -> list[str]:
        """Close the file and return what people should know, a line each."""
        self._file.close()
        notes = []
        if self._without:
            notes.append(f"{self._without:,} images without regions have no row: its readers fail on them")

        if self._texts:
            notes.append(f"{self._texts:,} texts are not in {FILE}: the format has none")

        return notes
