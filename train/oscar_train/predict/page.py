"""The page of a search: photos with the regions and tags that carried the match."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oscar_common.files import replacing
from oscar_shards.pages.page import page, text
from oscar_shards.pages.photos import find_photos
from oscar_shards.pages.view import sheet
from oscar_train.predict.model import TaskModel
from oscar_train.predict.photos import Photos
from oscar_train.predict.search import Match, SearchResult, contributions

LEAST = 0.1  # share of the largest fall from which on a region is drawn, at first; the page has a slider
TAGS = 6  # that are named under a photo


def write_page(
    path: Path, model: TaskModel, photos: Photos, result: SearchResult, title: str, folder: Path | None
) -> None:
    """Write what a search found as a page.

    Args:
        path: the file. model, photos: of the search. result: what it found. title: the text that was searched for.
        folder: where the photos lie; None: the folder that was extracted, if it is still there.
    """
    rows = [_row(model, photos, match, rank) for rank, match in enumerate(result.matches, 1)]
    place = folder or Path(photos.folders[0].manifest.plan.images)
    places = find_photos(place, [entry for _, entry in rows]) if place.is_dir() else [None] * len(rows)
    titled = [(tar, {**entry, "key": entry["title"]}) for tar, entry in rows]

    with replacing(path) as file:
        for piece in page(f"Search: {title}", _body(title, result, sheet(titled, places, LEAST, ""))):
            file.write(piece.encode("utf-8", "replace"))


def _row(model: TaskModel, photos: Photos, match: Match, rank: int) -> tuple[Path, dict[str, Any]]:
    """Return the tar and the row of a photo, with the shares of the match where a detector's scores stand."""
    tar, entry = photos.row(match.photo)
    regions, tags = contributions(model, photos, match)
    best = sorted(tags.items(), key=lambda item: -item[1])[:TAGS]
    carried = ", ".join(f"{tag} {share:.0%}" for tag, share in best if share > 0) or "none"
    scores = [*regions.tolist(), *[0.0] * (len(entry["tags"]) - len(regions))]
    texts = [
        {"kind": "caption", "source": "match", "text": f"{match.text} ({match.probability:.1%})"},
        {"kind": "caption", "source": "words of the tags that carried it", "text": carried},
    ]
    title = f"{rank}. {entry['path'] or entry['key']}"

    return tar, {**entry, "title": title, "scores": scores[: len(entry["tags"])], "attributes": [], "texts": texts}


def _body(title: str, result: SearchResult, figures: Iterator[str]) -> Iterator[str]:
    yield f"<h1>{text(title)}</h1>\n"
    yield (
        f'<p class="lead">The model looked at {result.scored:,} of {result.total:,}. The number at a region says '
        "how much the match falls without that region, as a share of the largest such fall.</p>\n"
    )
    yield from figures
