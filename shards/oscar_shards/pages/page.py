"""A web page in one file that loads nothing: its own style and script, and a policy that forbids all else."""

import base64
import hashlib
import html
import unicodedata
from collections.abc import Iterable, Iterator
from importlib import resources

# Only the script whose hash is named runs: should markup ever get into the page from a shard, it cannot act.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; script-src "
)
MARK = POLICY.encode()  # by which a command knows a page of its own


def page(title: str, body: Iterable[str]) -> Iterator[str]:
    """Yield a page in pieces; `body` is HTML, `title` is plain text."""
    style, script = _part("page.css"), _part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    yield (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}\'sha256-{digest}\'">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n<main>\n"
    )
    yield from body
    yield f"</main>\n<script>{script}</script>\n</html>\n"


def _part(name: str) -> str:
    return resources.files("oscar_shards.pages").joinpath(name).read_text("utf-8")


def text(content: object, most: int = 1000) -> str:
    """Return untrusted text for HTML, in an element or in a quoted attribute; at most so many characters of it."""
    return html.escape(visible(content, most))


def visible(content: object, most: int = 1000) -> str:
    """Return text without what could hide or act: control characters, marks that turn the writing around."""
    plain = str(content)
    cut = plain if len(plain) <= most else plain[:most] + "…"
    return "".join(" " if c in "\t\n\r" else "\ufffd" if _acts(c) else c for c in cut)


def _acts(character: str) -> bool:
    """Whether it is a control, format or surrogate character; joiners, which scripts and emoji need, are none."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\u200c\u200d\u00ad"


def number(value: float) -> str:
    """Return a count for people: 1,234, or 56.7 M."""
    return f"{value:,.0f}" if value < 1e7 else f"{value / 1e6:,.1f} M"


def size(count: float) -> str:
    """Return bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
