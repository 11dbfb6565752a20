"""`oscar-shards stats`: the numbers of shards as a table in the terminal, and as a page with plots."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from oscar_common.files import check_output_file, replacing
from oscar_common.progress import meter, plural
from oscar_shards.manifest import DetectorRecord
from oscar_shards.pages.lengths import LIMIT, Lengths
from oscar_shards.pages.page import MARK, number, page, size, text, visible
from oscar_shards.pages.plots import Bar, begin, binned, lying, sparkline, standing
from oscar_shards.pages.show import checked_index
from oscar_shards.read import manifest_of, tars_at
from oscar_shards.stats import SCORE_BINS, Stats, count_shard, mean, quantile

MOST_TAGS = 30
PLAIN_WIDTH = 130


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is reported; `detectors` are those of the manifests."""

    paths: Sequence[Path]
    stats: Stats
    lengths: Lengths
    detectors: list[DetectorRecord]

    @property
    def vocabulary(self) -> set[str]:
        """The classes that the manifests know."""
        return {name for detector in self.detectors for name in detector.classes}


def write_report(paths: Sequence[Path], html: Path | None, overwrite: bool = False) -> None:
    """Count, print, and write the page if one is asked for.

    Raises:
        UsageError: nothing to read or to write there, or a damaged shard.
    """
    if html:
        check_output_file(html, "--html", mark=MARK, overwrite=overwrite)

    statistics = measure(paths)
    print_report(statistics)
    if html:
        with replacing(html) as file:
            for piece in page("Shards in numbers", _body(statistics)):
                file.write(piece.encode("utf-8", "replace"))
        print(f"{html}: {size(html.stat().st_size)}")


def measure(paths: Sequence[Path]) -> Report:
    """Count shard after shard; one that is named twice counts once."""
    tars = list(dict.fromkeys(tar.resolve() for path in paths for tar in tars_at(path)))
    manifests = [m for m in map(manifest_of, dict.fromkeys(paths)) if m]
    stats, lengths = Stats(), Lengths()

    with meter("shards", len(tars)) as shown:
        for done, tar in enumerate(tars, start=1):
            table = checked_index(tar)
            stats += count_shard(tar, table)
            lengths.add(table)
            shown.show(done, stats.rejects.total())

    detectors = {(m.detector.name, m.detector.weights_sha256, m.detector.preset): m.detector for m in manifests}
    return Report(paths=paths, stats=stats, lengths=lengths, detectors=list(detectors.values()))


def facts(statistics: Report) -> Iterator[tuple[str, str]]:
    """Yield what one line can say, as (name, value)."""
    stats, lengths = statistics.stats, statistics.lengths
    for d in statistics.detectors:
        yield "detector", f"{d.name}, preset {d.preset}, {d.feature_dim:,} features a region as {d.dtype}"

    yield "images", f"{stats.images:,} in {plural(stats.shards, 'shard')}"
    per_image = size((stats.bytes + stats.index_bytes) / max(stats.images, 1))
    yield "bytes", f"{size(stats.bytes)} of tars, {size(stats.index_bytes)} of indexes; {per_image} an image"
    yield "triples (image, text)", f"{stats.triples.total():,}; {stats.images_without_text:,} images have no text"
    yield "regions", f"{stats.regions:,}; an image: {spread(stats.regions_of_image)}"
    yield "tags", f"{len(stats.tags):,} different on {stats.tags.total():,} regions{_unused(statistics)}"
    if stats.attributes:
        yield "attributes", f"{len(stats.attributes):,} different, {stats.attributes.total():,} in all"

    yield "tokens of a text", f"{spread(counted(lengths.words))}{sampled(lengths)}"
    yield "tokens of an image's tags", spread(lengths.tags)
    yield "tokens of a triple", f"{spread(counted(lengths.triples))}; {share_cut(lengths)}"
    refused = ", ".join(f"{reason}: {n:,}" for reason, n in stats.rejects.most_common())
    yield "rejects", f"{stats.rejects.total():,}{f'; {refused}' if refused else ''}"


def spread(counts: "Counter[int]") -> str:
    """Return least, quartiles, most and mean of numbers."""
    if not counts:
        return "none"
    low, *quartiles, high = (quantile(counts, share) for share in (0, 0.25, 0.5, 0.75, 1))
    return f"{low}-{high}, quartiles {' / '.join(map(str, quartiles))}, mean {mean(counts):.1f}"


def counted(numbers: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> "Counter[int]":
    """Return how often each number occurs."""
    return Counter(dict(zip(*(a.tolist() for a in np.unique(numbers, return_counts=True)), strict=True)))


def sampled(lengths: Lengths) -> str:
    """Say of how many texts the tokens were counted, if not of all."""
    return "" if lengths.stride == 1 else f" (a sample: {len(lengths.words):,} of {lengths.seen:,}, evenly spaced)"


def share_cut(lengths: Lengths) -> str:
    """Say how many triples training cuts."""
    longer = float((lengths.triples > LIMIT).mean()) if len(lengths.triples) else 0.0
    return f"{100 * longer:.1f} % have more than the {LIMIT} that training takes"


def _unused(statistics: Report) -> str:
    known = statistics.vocabulary
    unused = len(known - set(statistics.stats.tags))
    return f"; {unused:,} of the vocabulary's {len(known):,} never occur" if known else ""


def score_bars(stats: Stats) -> list[Bar]:
    """Return the scores' histogram."""
    return [(f"{n / SCORE_BINS:.2f}", int(times)) for n, times in enumerate(stats.scores)]


def print_report(statistics: Report) -> None:
    """Print the numbers as a table."""
    console = Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH

    stats = statistics.stats
    table = Table(
        "", escape(", ".join(visible(p) for p in statistics.paths)), title="oscar-shards stats", title_justify="left"
    )
    for name, value in facts(statistics):
        table.add_row(name, Text(visible(value, 2000)))

    table.add_section()
    table.add_row("triples by source, kind", Text(_listed(stats.triples, 20)))
    table.add_row("most frequent tags", Text(_listed(stats.tags, MOST_TAGS)))
    if stats.attributes:
        table.add_row("most frequent attributes", Text(_listed(stats.attributes, MOST_TAGS)))

    if (console.encoding or "").lower().startswith("utf"):
        table.add_section()
        for name, bars in histograms(statistics):
            if bars:
                table.add_row(name, Text(f"{bars[0][0]} {sparkline(bars)} {bars[-1][0]}"))

    console.print(table)


def histograms(statistics: Report) -> Iterator[tuple[str, list[Bar]]]:
    """Yield (name, bars) of what has a distribution."""
    yield "regions an image", binned(statistics.stats.regions_of_image)
    yield "scores", score_bars(statistics.stats) if statistics.stats.scores.any() else []
    yield "tokens of a text", binned(counted(statistics.lengths.words))
    yield "tokens of an image's tags", binned(statistics.lengths.tags)
    yield "tokens of a triple", binned(counted(statistics.lengths.triples))


def _listed(counts: "Counter[str]", most: int) -> str:
    return ", ".join(f"{visible(name, 60)} {n:,}" for name, n in counts.most_common(most)) or "none"


def _body(statistics: Report) -> Iterator[str]:
    stats = statistics.stats
    folders = ", ".join(map(str, statistics.paths))
    yield f'<h1>Shards in numbers</h1><p class="lead">{text(folders)}</p><div class="cards">'
    for name, value in (
        ("images", number(stats.images)),
        ("triples", number(stats.triples.total())),
        ("regions", number(stats.regions)),
        ("different tags", number(len(stats.tags))),
        ("shards", number(stats.shards)),
        ("of tars", size(stats.bytes)),
        ("rejects", number(stats.rejects.total())),
    ):
        yield f'<div class="card"><b>{value}</b><span>{name}</span></div>'

    yield f'</div>\n{fact_table(statistics)}\n<h2>Distributions</h2><div class="panels">\n'
    yield from _distributions(statistics)
    yield '</div>\n<h2>Most frequent</h2><div class="panels">\n'
    yield _panel("tags", lying(stats.tags.most_common(MOST_TAGS), "regions"), f"{len(stats.tags):,} in all")
    yield _panel("triples by source and kind", lying(stats.triples.most_common(MOST_TAGS), "triples"))
    if stats.attributes:
        yield _panel("attributes", lying(stats.attributes.most_common(MOST_TAGS), "regions"))

    if stats.rejects:
        yield _panel("rejects by reason", lying(stats.rejects.most_common(MOST_TAGS), "images"))

    yield "</div>\n"


def fact_table(statistics: Report) -> str:
    """Return what one line each can say as an HTML table."""
    rows = "".join(f"<tr><th>{text(name)}<td>{text(value, 2000)}" for name, value in facts(statistics))
    return f'<div class="panel"><table>{rows}</table></div>'


def _distributions(statistics: Report) -> Iterator[str]:
    """Yield a panel for each histogram; that of triples has a line where training cuts."""
    units = ("images", "regions", "texts", "images", "triples")
    for (name, bars), unit in zip(histograms(statistics), units, strict=True):
        note, mark = f"highest bar: {max((n for _, n in bars), default=0):,} {unit}", 0
        if unit == "triples":
            note += f"; {share_cut(statistics.lengths)} (the line)"
            mark = next((n for n, (label, _) in enumerate(bars) if int(begin(label)) > LIMIT), 0)
        yield _panel(name, standing(bars, unit, mark), note)


def _panel(name: str, plot: str, note: str = "") -> str:
    below = f'<p class="note">{text(note)}</p>' if note else ""
    return f'<section class="panel"><h2>{text(name)}</h2>{below}{plot}</section>\n'
