"""From settings to a request: which datasets, where they lie, and what is kept out."""

import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from oscar_common.errors import UsageError, nearest
from oscar_common.files import no_folder
from oscar_common.settings import LAYOUTS, Catalog, Extract
from oscar_extract.sources.corpus import LISTS, Part, Request
from oscar_extract.sources.inventory import FAMILIES, readable
from oscar_extract.sources.place import SPLITS
from oscar_extract.sources.remote import cache_of, find_tars
from oscar_shards.url import local_path, shown

ALIASES = {  # what people call the folder of a dataset, in lower case
    "coco": ("mscoco", "coco2014", "coco2017", "ms-coco", "ms_coco"),
    "cc": ("cc3m", "gcc", "conceptual_captions", "conceptual-captions", "conceptualcaptions"),
    "sbu": ("sbu_captions", "sbu-captions", "sbucaptions", "sbucaptionedphotodataset"),
    "flickr30k": ("flickr30k_images", "flickr30k-images", "flickr8k"),
    "vqa": ("vqav2", "vqa_v2", "vqa-v2", "vqa2"),
    "vg-qa": ("vg_qa", "vgqa", "vg", "visual_genome", "visual-genome", "visualgenome"),
}
SHARED = {"vqa": ("coco",), "gqa": ("vg", "coco"), "vg-qa": ("vg", "coco")}  # whose images a dataset asks about


def make_request(settings: Extract, catalog: Catalog) -> Request:
    """Check what the settings say of datasets and images.

    Raises:
        UsageError: nothing to extract, an unknown name, or a flag that misses its partner.
    """
    names = [name.strip() for given in settings.dataset for name in given.split(",") if name.strip()]
    if not names and settings.images is None:
        raise UsageError("no images: give --images DIR (or --dataset or --pipeline NAME)")

    parts = _dataset_parts(settings, catalog, names) if names else [_images_part(settings)]
    published = any(part.layout for part in parts)
    if settings.root and not published:
        raise UsageError(f"--root {settings.root[0]}: it goes with --dataset {', '.join(LAYOUTS)}")
    if settings.captions and published:
        raise UsageError(f"--captions {settings.captions}: it goes with --images; a --dataset brings its own texts")

    further = _own_images(settings, settings.images) if published and settings.images else None
    return Request(
        parts=parts,
        images=further.root if further else None,
        remote=further.remote if further else None,
        beside=_beside(parts, settings.root),
        splits=_splits(settings.splits),
        exclude=tuple(_place("--exclude", path) for path in settings.exclude),
        merge_duplicates=settings.duplicates == "merge",
        out=Path(settings.out) if settings.out else None,
    )


def _images_part(settings: Extract) -> Part:
    part = _own_images(settings, settings.images or "")
    root = part.root
    name = settings.source or (root.stem if root.is_file() else root.resolve().name)
    return replace(part, name=readable(name).replace("/", "_") or "images")


def _own_images(settings: Extract, images: str, captions: str | None = None) -> Part:
    """Return a nameless part of what `--images` says: a folder, a file, or tars behind a URL."""
    captions = settings.captions or captions
    if local_path(images) is not None:
        return Part(name="", layout=None, root=_place("--images", images), captions=captions)
    tars = find_tars(images, cache_of(settings), "--images")
    return Part(name="", layout=None, root=tars.path, captions=captions, remote=tars)


def _dataset_parts(settings: Extract, catalog: Catalog, names: list[str]) -> list[Part]:
    for name in names:
        if name not in catalog.datasets and name not in LAYOUTS:
            raise UsageError(f"--dataset: no dataset {name!r}{nearest(name, {*catalog.datasets, *LAYOUTS})}")

    roots = _roots(settings, catalog, names)
    parts = [_entry(settings, catalog, n, roots) if n in catalog.datasets else _layout(n, roots[n]) for n in names]
    own_names = [part.name for part in parts if not part.layout]

    for name in own_names:
        if own_names.count(name) > 1:
            raise UsageError(f"--dataset: two of {', '.join(names)} have the source {name!r}; give each its own")

    return parts


def _roots(settings: Extract, catalog: Catalog, names: list[str]) -> dict[str, str]:
    """Return the folder of each dataset in a published layout; --root is for those that have none, or if all do, wins.

    Raises:
        UsageError: there are more or fewer of --root than datasets that need one.
    """
    entries = {n: catalog.datasets[n].root for n in names if n in catalog.datasets and catalog.datasets[n].layout}
    layouts = [n for n in names if n not in catalog.datasets or n in entries]
    known = {name: root for name, root in entries.items() if root}
    rooted = [n for n in layouts if n not in known] or (layouts if settings.root else [])
    if rooted and len(settings.root) not in (1, len(rooted)):
        raise UsageError(
            f"--root: {len(settings.root)} given for --dataset {','.join(rooted)}; give one, or one for each in turn"
        )

    given = settings.root * len(rooted) if len(settings.root) == 1 else settings.root
    return {**known, **dict(zip(rooted, given, strict=True))}


def _layout(name: str, root: str, layout: str | None = None) -> Part:
    layout, place = layout or name, _place("--root", root)
    if not place.is_dir():
        raise UsageError(f"--root {place}: {no_folder(place)}")
    return Part(name=layout, layout=layout, root=_folder_of(layout, place))


def _folder_of(layout: str, place: Path) -> Path:
    """Return the folder in `place` that has a dataset's name, in any case; or `place`, if the lists are only there."""
    inner = {path.name.lower(): path for path in sorted(place.iterdir(), reverse=True) if path.is_dir()}
    named = [inner[name] for name in (layout, *ALIASES.get(layout, ())) if name in inner]
    with_lists = next((folder for folder in [*named, place] if _has_lists(layout, folder)), None)
    return with_lists or [*named, place][0]


def _has_lists(layout: str, folder: Path, depth: int = 3) -> bool:
    """Whether a folder, or one not far below it, has files that a dataset is known by."""
    folders = [""]
    for path in folders:
        with suppress(OSError), os.scandir(folder / path) as scan:  # the inventory says what cannot be listed
            for entry in scan:
                name = os.path.join(path, entry.name)
                if not entry.name.startswith(".") and any(re.search(pattern, name) for pattern in LISTS[layout]):
                    return True
                if name.count("/") < depth and entry.is_dir() and not entry.name.startswith("."):
                    folders.append(name)

    return False


def _beside(parts: list[Part], roots: list[str]) -> tuple[Path, ...]:
    """Return the folders in --root whose images the datasets of the job share, although they are others'."""
    paths = []
    for part in parts:
        for root in map(Path, roots):
            if part.layout and part.root.parent == root:
                paths += [p for p in sorted(root.iterdir()) if p.is_dir() and _has_images_of(part.layout, p.name)]
    return tuple(dict.fromkeys(p for p in paths if p not in {part.root for part in parts}))


def _has_images_of(layout: str, folder: str) -> bool:
    return any(re.search(FAMILIES[family], folder) for family in SHARED.get(layout, ()))


def _entry(settings: Extract, catalog: Catalog, name: str, roots: dict[str, str]) -> Part:
    """Return the part of an entry under `datasets:` in pipelines.yaml; flags win over it."""
    entry = catalog.datasets[name]
    if entry.layout:
        return _layout(name, roots[name], entry.layout)

    images = settings.images or entry.images
    if images is None:
        raise UsageError(f"--dataset {name}: its entry in pipelines.yaml has neither images nor a layout")

    source = settings.source or entry.source or name
    return replace(_own_images(settings, images, entry.captions), name=source.replace("/", "_"))


def _place(flag: str, text: str) -> Path:
    path = local_path(text)
    if path is None:
        raise UsageError(f"{flag} {shown(text)}: a URL is not read here; only --images takes one")
    if not path.exists():
        raise UsageError(f"{flag} {path}: no such {'file' if flag == '--exclude' else 'folder'}")
    return path


def _splits(text: str) -> frozenset[str]:
    splits = [s.strip() for s in text.split(",") if s.strip()]
    for split in splits:
        if split not in SPLITS:
            raise UsageError(f"--splits: {split!r} is not allowed{nearest(split, SPLITS)}")

    if not splits:
        raise UsageError(f"--splits: nothing given; allowed: {', '.join(SPLITS)}")

    return frozenset(splits)
