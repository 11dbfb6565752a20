"""Regions to look at: boxes and tags drawn on the photo, and a page of such photos."""

import base64
import colorsys
import html
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from oscar_shards.read import ShardFolder, read_boxes

CSS = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1200px;padding:0 1em;color:#222}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:1.2em}
figure{margin:0}figure img{width:100%;border-radius:4px}
figcaption{font-size:13px}figcaption ul{margin:.2em 0;padding-left:1.2em}
table{border-collapse:collapse}td,th{padding:.15em .8em .15em 0;text-align:left;vertical-align:top}.key{color:#777}"""


def draw_regions(
    photo: Image.Image, boxes: npt.NDArray[np.float32], tags: list[str], scores: list[float]
) -> Image.Image:
    """Return a copy of the photo (RGB, W x H) with boxes [K, 4] (xyxy, its pixels) and labels drawn on it."""
    drawn = photo.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    size = max(drawn.size) / 34
    font = ImageFont.load_default(max(size, 9))
    for box, tag, score in reversed(list(zip(boxes.tolist(), tags, scores, strict=True))):  # the surest on top
        colour = _colour(tag)
        label = f"{tag} {score:.2f}"
        pen.rectangle(box, outline=colour, width=max(2, round(size / 6)))
        corner = (box[0], max(box[1] - 1.25 * size, 0))
        pen.rectangle(pen.textbbox(corner, label, font=font), fill=colour)
        pen.text(corner, label, fill="white", font=font)
    return drawn


def _colour(tag: str) -> tuple[int, int, int]:
    red, green, blue = colorsys.hls_to_rgb(crc32(tag.encode()) % 360 / 360, 0.38, 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def photo_of(row: dict[str, Any], images: Path | None, width: int = 640) -> Image.Image:
    """Return an image's photo from the folder `images`, at most `width` wide, or a blank canvas of its shape."""
    path = images / row["path"] if images else None
    if path and path.is_file():
        with Image.open(path) as image:
            photo = ImageOps.exif_transpose(image).convert("RGB")
    else:
        photo = Image.new("RGB", (row["width"], row["height"]), "#ddd")
    scale = min(1.0, width / photo.width)
    return photo.resize((max(1, round(photo.width * scale)), max(1, round(photo.height * scale))))


def draw_row(folder: ShardFolder, row: dict[str, Any], images: Path | None, min_score: float) -> Image.Image:
    """Draw one image's regions of at least `min_score`, given its row of the table as a dict."""
    photo = photo_of(row, images)
    shown = [n for n, score in enumerate(row["scores"]) if score >= min_score]
    boxes = read_boxes(folder.tars[row["shard"]], row)[shown] * np.float32(photo.width / row["width"])
    return draw_regions(photo, boxes, [row["tags"][n] for n in shown], [row["scores"][n] for n in shown])


def figures(folder: ShardFolder, images: Path | None, limit: int, min_score: float) -> Iterator[str]:
    """Yield an HTML figure for each of the first `limit` images: photo with regions, key, texts."""
    for row in folder.table.slice(0, limit).to_pylist():
        texts = "".join(f"<li>{html.escape(t['text'] or t['question'] + ' ' + t['answer'])}</li>" for t in row["texts"])
        picture = embedded(draw_row(folder, row, images, min_score))
        yield (
            f'<figure><img alt="{html.escape(", ".join(row["tags"]))}" src="{picture}">'
            f'<figcaption><span class="key">{html.escape(row["key"])}: {row["num_boxes"]} regions</span>'
            f"<ul>{texts}</ul></figcaption></figure>"
        )


def embedded(image: Image.Image) -> str:
    """Return an image as a data: URL, so that a page is one file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
