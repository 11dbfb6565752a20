"""Regions to look at: photos with boxes, tags, scores and texts as HTML figures, and a sheet of them."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt

from oscar_common.progress import plural
from oscar_shards.pages.page import text
from oscar_shards.pages.photos import embedded

MOST = 1000  # regions, and texts, of one image that are shown
MOST_LABELS = 200  # of one image that are kept free of others
ROOM = 6  # percent of a photo's height that a label takes
SHOWN_TEXTS = 6  # the others are folded away
TAGS = 5000  # in the list that the tag field offers
NO_SHAPE = (640.0, 480.0)
FAR = 1e7  # pixels; no image has a side of so many
Picture = tuple[str, int, int]  # data: URL, width, height


class Region(NamedTuple):
    """A box (xyxy, pixels of the original image) with what is known of it; `score` is None where there is none."""

    box: tuple[float, float, float, float]
    tag: str
    score: float | None
    attributes: list[str]

    @property
    def says(self) -> str:
        """All of it as one line."""
        head = f"{self.tag} {_score(self.score)}".strip() or "region"
        return f"{head}: {', '.join(self.attributes)}" if self.attributes else head


def boxes_of(tar: Path, row: dict[str, Any]) -> npt.NDArray[np.float32]:
    """Return the first boxes of an image, float32 [K, 4]; none if the index does not say where in the tar they lie."""
    count, begin, size = (row.get(name) for name in ("num_boxes", "boxes_offset", "boxes_bytes"))
    if not (count and begin and size and count > 0 and size == 16 * count and 0 < begin <= tar.stat().st_size - size):
        return np.zeros((0, 4), np.float32)
    return np.fromfile(tar, "<f4", 4 * min(count, MOST), offset=begin).reshape(-1, 4)


def regions_of(row: dict[str, Any], boxes: npt.NDArray[np.float32]) -> list[Region]:
    """Pair boxes with tags, scores and attributes, the surest last; what is not a box in the plane is left out."""
    tags, scores, attributes = ((row.get(name) or [])[: len(boxes)] for name in ("tags", "scores", "attributes"))
    regions = []
    for corners, tag, score, some in zip_longest(boxes.tolist()[:MOST], tags, scores, attributes):
        if all(map(math.isfinite, corners)):
            x0, y0, x1, y1 = (min(max(c, -FAR), FAR) for c in corners)
            box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
            finite_score = score if score is not None and math.isfinite(score) else None
            regions.append(
                Region(box, tag or "", finite_score, [_attribute(a) for a in some or () if a and a.get("name")])
            )

    return sorted(regions, key=lambda region: -1.0 if region.score is None else region.score)


def _attribute(attribute: dict[str, Any]) -> str:
    return f"{attribute['name']} {_score(attribute.get('score'))}".strip()


def _score(score: float | None) -> str:
    return "" if score is None or not math.isfinite(score) else f"{score:.2f}"


def figure(row: dict[str, Any], boxes: npt.NDArray[np.float32], picture: Picture | None) -> str:
    """Return one image as an HTML figure, given its row of the index as a dict. All of it may be anything."""
    regions = regions_of(row, boxes)
    width, height = _shape(row, regions, picture)
    shown = max(0.2, min(5.0, width / height))  # a strip of a photo is drawn wider than it is
    alt = ", ".join(Counter(r.tag for r in reversed(regions) if r.tag))
    image = f'<img alt="{text(alt)}" src="{picture[0]}">' if picture else ""
    rects, labels = "".join(map(_rect, regions)), "".join(_labels(regions, width, height))
    key = text(row.get("key") or "")

    return (
        f'<figure><div class="frame" tabindex="0" role="button" aria-label="Enlarge {key}">'
        f'<div class="photo{"" if picture else " blank"}" style="--w:{shown:.5f};--h:1">{image}'
        f'<svg viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="none">{rects}</svg>{labels}</div></div>\n'
        f'<figcaption><bdi class="key">{key}</bdi> <span class="meta">{_meta(row, regions)}</span>\n'
        f"{_chips(regions)}{_texts(row)}</figcaption></figure>\n"
    )


def _shape(row: dict[str, Any], regions: list[Region], picture: Picture | None) -> tuple[float, float]:
    """Return an image's width and height: as stored, else the photo's, else such that all boxes fit."""
    width, height = (row.get(name) or 0 for name in ("width", "height"))
    if width > 0 and height > 0:
        return width, height
    if picture:
        return picture[1], picture[2]
    return tuple(max([1, *(r.box[n] for r in regions)]) for n in (2, 3)) if regions else NO_SHAPE  # type: ignore[return-value]


def _hue(tag: str) -> str:
    return f"--hue:{crc32(tag.encode('utf-8', 'replace')) % 360}"


def _rect(region: Region) -> str:
    x0, y0, x1, y1 = region.box
    score = "" if region.score is None else f' data-score="{region.score:.4f}"'
    return (
        f'<rect x="{x0:.2f}" y="{y0:.2f}" width="{x1 - x0:.2f}" height="{y1 - y0:.2f}" style="{_hue(region.tag)}" '
        f'data-tag="{text(region.tag)}"{score} aria-label="{text(region.says)}"/>'
    )


def _labels(regions: list[Region], width: float, height: float) -> Iterator[str]:
    """Yield a label for each region; one that would lie over a surer one's is `crowded`: only shown enlarged."""
    places = [_place(region, width, height) for region in regions]
    crowded = _crowded(places)
    for number, (region, (x0, y0, x1, y1)) in enumerate(zip(regions, places, strict=True)):
        side = f"left:{x0:.2f}%" if x1 < 100 else "right:0"
        inside = region.box[1] < ROOM / 100 * height
        kind = f"label{' inside' * inside}{' crowded' * (number in crowded)}"
        words = f"<b>{text(region.tag, 60)}</b> {_score(region.score)}"
        yield f'<span class="{kind}" style="{side};top:{y0 if inside else y1:.2f}%;{_hue(region.tag)}">{words}</span>'


def _place(region: Region, width: float, height: float) -> tuple[float, float, float, float]:
    """Return where about a label lies (xyxy, percent of the photo): above its box, or within where no room is above."""
    left, top = (min(max(100 * x / side, 0.0), 100.0) for x, side in ((region.box[0], width), (region.box[1], height)))
    wide = 2.1 * (min(len(region.tag), 60) + 5) * max(1.0, height / width)
    x0, y0 = left if left + 1.2 * wide < 100 else 100 - wide, top if top < ROOM else top - ROOM
    return x0, y0, x0 + wide, y0 + ROOM


def _crowded(places: list[tuple[float, float, float, float]]) -> set[int]:
    """Return the numbers of the labels that lie over one of a later number, which is surer."""
    placed: list[tuple[float, float, float, float]] = []
    crowded = set()
    for number in reversed(range(len(places))):
        x0, y0, x1, y1 = places[number]
        if any(x0 < right and left < x1 and y0 < bottom and top < y1 for left, top, right, bottom in placed):
            crowded.add(number)
        elif len(placed) < MOST_LABELS:
            placed.append(places[number])

    return crowded


def _meta(row: dict[str, Any], regions: list[Region]) -> str:
    count = row.get("num_boxes") or 0
    undrawn = f" ({count - len(regions):,} cannot be drawn)" if count > len(regions) else ""
    parts = [
        text(row.get("source") or "", 100),
        f"{row.get('width') or '?'} × {row.get('height') or '?'}",
        f"{plural(count, 'region')}{undrawn}",
    ]
    return " · ".join(filter(None, parts))


def _chips(regions: list[Region]) -> str:
    """Return the image's tags, the surest first, with how often they occur."""
    counts = Counter(r.tag for r in reversed(regions) if r.tag)
    chips = (
        f'<button type="button" class="chip" style="{_hue(tag)}" data-tag="{text(tag)}">{text(tag, 60)}'
        f"{f' <i>×{n}</i>' if n > 1 else ''}</button>"
        for tag, n in counts.items()
    )
    return f'<div class="chips">{"".join(chips)}</div>\n' if counts else ""


def _texts(row: dict[str, Any]) -> str:
    lines = [_text(t) for t in (row.get("texts") or [])[:MOST] if t]
    first, rest = "".join(lines[:SHOWN_TEXTS]), "".join(lines[SHOWN_TEXTS:])
    more = f"<li><details><summary>{len(lines) - SHOWN_TEXTS} more</summary>" if rest else ""
    folded = f'{more}<ul class="texts">{rest}</ul></details></li>' if rest else ""
    return f'<ul class="texts">{first}{folded}</ul>'


def _text(one: dict[str, Any]) -> str:
    content = one.get("text") or one.get("question") or ""
    answer = f" <b>{text(one['answer'])}</b>" if one.get("answer") else ""
    return f'<li dir="auto" title="{text(one.get("source") or "", 100)}">{text(content)}{answer}</li>'


def figures(rows: Sequence[tuple[Path, dict[str, Any]]], photos: Iterable[Path | None]) -> Iterator[str]:
    """Yield an HTML figure for each (tar, row of its index), with its photo where it has one."""
    for (tar, row), picture in zip(rows, embedded(photos), strict=True):
        yield figure(row, boxes_of(tar, row), picture)


def sheet(
    rows: Sequence[tuple[Path, dict[str, Any]]], photos: Iterable[Path | None], score: float, tag: str = ""
) -> Iterator[str]:
    """Yield a contact sheet in pieces: filters, set to a least `score` and a `tag` at first, and the figures."""
    counts = Counter(name for _, row in rows for name in {n for n in row.get("tags") or () if n})
    options = "".join(
        f'<option value="{text(name)}">{plural(n, "image")}</option>' for name, n in counts.most_common(TAGS)
    )
    yield f"""<form class="tools" id="tools" autocomplete="off">
<input type="search" id="tag" list="tags" value="{text(tag)}" placeholder="tag, of {len(counts):,}" aria-label="Tag">
<datalist id="tags">{options}</datalist>
<label>score ≥ <input type="range" id="score" min="0" max="1" step="0.01" value="{score}">
<output id="least"></output></label>
<input type="search" id="text" placeholder="search in texts" aria-label="Search in texts">
<label><input type="checkbox" id="labels" checked> labels</label>
<button type="button" id="reset">reset</button>
<span class="count" id="count" role="status"></span></form>
<div class="sheet">
"""
    yield from figures(rows, photos)
    yield """</div>
<p class="nothing" id="nothing" hidden>No image fits these filters.</p>
<dialog id="large"><div class="bar"><button type="button" id="before" aria-label="Before">‹</button>
<button type="button" id="after" aria-label="After">›</button><button type="button" id="close">close</button></div>
<div class="place"></div></dialog>
"""
