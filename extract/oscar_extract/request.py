"""From settings to a request: which datasets, where they lie, and what is kept out."""

from pathlib import Path

from oscar_common.errors import UsageError, nearest
from oscar_common.settings import LAYOUTS, Catalog, Extract
from oscar_extract.sources.corpus import Part, Request
from oscar_extract.sources.inventory import readable
from oscar_extract.sources.place import SPLITS


def make_request(settings: Extract, catalog: Catalog) -> Request:
    """Check what the settings say of datasets and images.

    Raises:
        UsageError: nothing to extract, an unknown name, or a flag that misses its partner.
    """
    names = [name for given in settings.dataset for name in given.split(",") if name]
    if not names and settings.images is None:
        raise UsageError("no images: give --images DIR (or --dataset or --pipeline NAME)")
    parts = _dataset_parts(settings, catalog, names) if names else [_images_part(settings)]
    published = any(part.layout for part in parts)
    if settings.root and not published:
        raise UsageError(f"--root {settings.root[0]}: it goes with --dataset {', '.join(LAYOUTS)}")
    if settings.captions and published:
        raise UsageError(f"--captions {settings.captions}: it goes with --images; a --dataset brings its own texts")
    return Request(
        parts=parts,
        images=_place("--images", settings.images) if published and settings.images else None,
        splits=_splits(settings.splits),
        exclude=tuple(_place("--exclude", path) for path in settings.exclude),
        merge_duplicates=settings.duplicates == "merge",
        out=Path(settings.out) if settings.out else None,
    )


def _images_part(settings: Extract) -> Part:
    root = _place("--images", settings.images or "")
    name = settings.source or (root.stem if root.is_file() else root.resolve().name)
    return Part(name=readable(name).replace("/", "_") or "images", layout=None, root=root, captions=settings.captions)


def _dataset_parts(settings: Extract, catalog: Catalog, names: list[str]) -> list[Part]:
    published = [n for n in names if n not in catalog.datasets]
    for name in published:
        if name not in LAYOUTS:
            raise UsageError(f"--dataset: no dataset {name!r}{nearest(name, {*catalog.datasets, *LAYOUTS})}")
    if published and len(settings.root) not in (1, len(published)):
        raise UsageError(
            f"--root: {len(settings.root)} given for --dataset {','.join(published)}; give one, or one for each in turn"
        )
    roots = iter(settings.root * len(published) if len(settings.root) == 1 else settings.root)
    return [_entry(settings, catalog, n) if n in catalog.datasets else _layout(n, next(roots)) for n in names]


def _layout(name: str, root: str, layout: str | None = None) -> Part:
    layout, place = layout or name, _place("--root", root)
    return Part(name=layout, layout=layout, root=place / layout if (place / layout).is_dir() else place)


def _entry(settings: Extract, catalog: Catalog, name: str) -> Part:
    """Return the part of an entry under `datasets:` in pipelines.yaml; flags win over it."""
    entry = catalog.datasets[name]
    if entry.layout:
        if entry.root is None and not settings.root:
            raise UsageError(f"--dataset {name}: its entry in pipelines.yaml has a layout but no root; give --root DIR")
        return _layout(name, entry.root or settings.root[0], entry.layout)
    images = settings.images or entry.images
    if images is None:
        raise UsageError(f"--dataset {name}: its entry in pipelines.yaml has neither images nor a layout")
    source = settings.source or entry.source or name
    return Part(name=source, layout=None, root=_place("--images", images), captions=settings.captions or entry.captions)


def _place(flag: str, given: str) -> Path:
    path = Path(given)
    if not path.exists():
        raise UsageError(f"{flag} {path}: no such {'file' if flag == '--exclude' else 'folder'}")
    return path


def _splits(given: str) -> frozenset[str]:
    splits = [s.strip() for s in given.split(",") if s.strip()]
    for split in splits:
        if split not in SPLITS:
            raise UsageError(f"--splits: {split!r} is not allowed{nearest(split, SPLITS)}")
    if not splits:
        raise UsageError(f"--splits: nothing given; allowed: {', '.join(SPLITS)}")
    return frozenset(splits)
