"""Bars: as SVG in a page, as blocks in a terminal."""

from collections import Counter
from collections.abc import Sequence

from oscar_shards.pages.page import text

WIDTH = 560
BLOCKS = " ▁▂▃▄▅▆▇█"
Bar = tuple[str, int]  # label, count


def binned(counts: Counter[int], most: int = 40) -> list[Bar]:
    """Return a histogram of the numbers counted, with bins of equal whole width, `most` at most."""
    if not counts:
        return []

    low, high = min(counts), max(counts)
    width = -(-(high - low + 1) // most)
    sums = Counter[int]()

    for number, times in counts.items():
        sums[(number - low) // width] += times

    names = ((low + n * width, low + (n + 1) * width - 1) for n in range((high - low) // width + 1))
    return [(f"{a}" if a == b else f"{a}-{b}", sums[n]) for n, (a, b) in enumerate(names)]


def begin(label: str) -> str:
    """Return the least number of a bin, given its label."""
    return label.partition("-")[0]


def lying(bars: Sequence[Bar], unit: str) -> str:
    """Return an SVG of lying bars, each with its label before it and its count after it."""
    if not bars:
        return '<p class="note">none</p>'

    left, row, most = 190, 22, max(n for _, n in bars)
    parts = []
    for number, (label, n) in enumerate(bars):
        y, long = number * row, (WIDTH - left - 70) * n / most
        parts.append(
            f'<g><title>{text(label, 200)}: {n:,} {unit}</title><rect class="track" x="0" y="{y}" width="{WIDTH}" '
            f'height="{row}"/><text x="{left - 8}" y="{y + 15}" text-anchor="end">{text(label, 26)}</text>'
            f'<rect x="{left}" y="{y + 3}" width="{max(long, 1):.1f}" height="{row - 6}" rx="3"/>'
            f'<text class="soft" x="{left + max(long, 1) + 6:.1f}" y="{y + 15}">{n:,}</text></g>'
        )

    return _svg("".join(parts), row * len(bars))


def standing(bars: Sequence[Bar], unit: str, mark: int = 0) -> str:
    """Return an SVG of standing bars, a histogram, with an upright line before the bar of number `mark`."""
    if not any(n for _, n in bars):
        return '<p class="note">none</p>'

    high, step, most = 150, WIDTH / max(len(bars), 1), max(n for _, n in bars)
    parts = []
    for number, (label, n) in enumerate(bars):
        tall = max(high * n / most, 1.5 if n else 0)
        parts.append(
            f"<g><title>{text(label)}: {n:,} {unit}</title>"
            f'<rect class="track" x="{number * step:.2f}" y="0" width="{step:.2f}" height="{high}"/>'
            f'<rect x="{number * step + step * 0.06:.2f}" y="{high - tall:.1f}" width="{step * 0.88:.2f}" '
            f'height="{tall:.1f}" rx="{min(2.5, step / 6):.1f}"/></g>'
        )

    every = -(-len(bars) // 10)
    names = "".join(
        f'<text class="soft" x="{(n + 0.5) * step:.1f}" y="{high + 16}" text-anchor="middle">{begin(label)}</text>'
        for n, (label, _) in enumerate(bars)
        if n % every == 0
    )
    line = f'<line x1="0" y1="{high}" x2="{WIDTH}" y2="{high}"/>'
    if 0 < mark < len(bars):
        line += f'<line class="mark" x1="{mark * step:.1f}" y1="0" x2="{mark * step:.1f}" y2="{high}"/>'

    return _svg("".join(parts) + line + names, high + 22)


def _svg(content: str, height: float) -> str:
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img">{content}</svg>'


def sparkline(bars: Sequence[Bar]) -> str:
    """Return a histogram as a line of blocks."""
    most = max((n for _, n in bars), default=0)
    return "".join(BLOCKS[-(-8 * n // most)] if most else " " for _, n in bars)
