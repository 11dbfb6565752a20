"""The corpus: several datasets joined over one set of images, each image once, with all its texts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from oscar_common.errors import UsageError
from oscar_extract.sources.coco import read_coco
from oscar_extract.sources.downloads import read_cc, read_sbu
from oscar_extract.sources.duplicates import twins
from oscar_extract.sources.exclude import are_named, read_excluded
from oscar_extract.sources.flickr30k import read_flickr30k
from oscar_extract.sources.folder import read_folder
from oscar_extract.sources.genome import coco_twins, read_gqa, read_vg_qa
from oscar_extract.sources.inventory import Inventory, take_inventory
from oscar_extract.sources.listing import is_listing, read_listing
from oscar_extract.sources.place import SPLITS, Place
from oscar_extract.sources.splits import karpathy_split
from oscar_extract.sources.tables import (
    FILES,
    LEFT_OUT,
    Annotations,
    Ints,
    array,
    columns,
    find,
    strings,
)
from oscar_extract.sources.vqa import read_vqa

Bools = npt.NDArray[np.bool_]
READERS: dict[str, Callable[[Place], Annotations]] = {
    "coco": read_coco,
    "cc": read_cc,
    "sbu": read_sbu,
    "flickr30k": read_flickr30k,
    "gqa": read_gqa,
    "vqa": read_vqa,
    "vg-qa": read_vg_qa,
}
MISSING = ("missing", "dead-link")  # reasons that count against --max-reject-fraction


@dataclass(frozen=True, kw_only=True)
class Part:
    """One dataset of a job: a published layout under `root`, or with layout None, a folder or a manifest file."""

    name: str
    layout: str | None
    root: Path
    captions: str | None = None

    @property
    def flag(self) -> str:
        """The flag that names its folder."""
        return "--root" if self.layout else "--images"

    @property
    def is_listing(self) -> bool:
        """Whether it is a manifest file."""
        return not self.layout and is_listing(self.root)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a job shall be about; see the settings of the same names."""

    parts: list[Part]
    images: Path | None = None  # a further folder with the images of published layouts
    splits: frozenset[str] = frozenset({"train"})
    exclude: tuple[Path, ...] = ()
    merge_duplicates: bool = True
    out: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Images that have a file, each once, and their texts.

    image: "source/id" [N]. files: their rows of the schema FILES. also: the paths of other files with the same bytes,
    a list for each image. mentions: which dataset (name) lists which image (row), as two columns. texts: a table of
    the schema TEXTS, sorted by `text_row`, the image's row. left_out: a table of the schema LEFT_OUT.
    """

    roots: list[Path]
    image: pa.Array
    files: pa.Table
    also: pa.Array
    mentions: pa.Table
    texts: pa.Table
    text_row: Ints
    left_out: pa.Table


def find_files(request: Request) -> Inventory:
    """List what lies in the folders of a job."""
    walked = [p for p in request.parts if not p.is_listing]
    folders = list(dict.fromkeys([p.root for p in walked] + ([request.images] if request.images else [])))
    inner = request.out if request.out and request.out.resolve() not in {f.resolve() for f in folders} else None
    return take_inventory(folders, walked[0].flag if walked else "--images", inner)


def read_corpus(request: Request, inventory: Inventory) -> Corpus:
    """Read what the datasets say of the files found, and join it all.

    Raises:
        UsageError: something is not there, cannot be read, or leaves no image.
    """
    roots, files, images, texts, left_out = _read_parts(request, inventory)
    same = coco_twins(inventory)
    images = images.set_column(1, "image", _renamed(array(images["image"]), same))
    texts = texts.set_column(0, "image", _renamed(array(texts["image"]), same))
    names = pc.unique(array(images["image"]))
    of_mention = find(array(images["image"]), names)
    file = _first_file(array(images["file"]).to_numpy(), of_mention, len(names))
    first = np.unique(of_mention, return_index=True)[1]
    mention = images.take(pa.array(first))
    out_of_splits, held_out = _held_out(request, inventory, images, of_mention, names)
    paths = array(files["path"]).take(pa.array(file, mask=file < 0))
    excluded = _excluded(request, names, paths, array(mention["name"]))
    missing = (file < 0) & ~held_out & ~excluded & ~out_of_splits
    keep = (file >= 0) & ~held_out & ~excluded & ~out_of_splits
    because = array(mention["message"])
    left_out = [
        *left_out,
        _left(mention, held_out, "held-out", "of a validation or test split"),
        _left(mention, excluded & ~held_out, "excluded", "named by --exclude"),
        _left(mention, missing & because.is_null().to_numpy(zero_copy_only=False), "missing", array(mention["name"])),
        _left(mention, missing & because.is_valid().to_numpy(zero_copy_only=False), "dead-link", because),
    ]
    if not keep.any():
        reasons = ", ".join(
            f"{int(n.sum())} {r}" for r, n in (("missing", missing), ("held out", held_out), ("excluded", excluded))
        )
        hint = "; --splits takes other splits" if held_out.any() else ""
        raise UsageError(f"no image is left of the {len(names)} of {_described(request)}: {reasons}{hint}")
    kept = np.flatnonzero(keep)
    group = _groups(request, roots, files, file[kept])
    row = np.full(len(names), -1, np.int64)
    row[kept] = group
    # Groups are numbered by their first image, so the corpus keeps the order in which the datasets name images.
    leaders = kept[np.unique(group, return_index=True)[1]]
    also, twin_rows = _also(files, file, kept, group, leaders)
    left_out.append(_left(mention, twin_rows, "duplicate", "its bytes are those of another image, which has its texts"))
    texts, text_row, strays = _texts(texts, names, row, missing)
    listed = row[of_mention]
    return Corpus(
        roots=roots,
        image=names.take(pa.array(leaders)),
        files=files.take(pa.array(file[leaders])),
        also=also,
        mentions=pa.table({"dataset": array(images["dataset"]), "row": pa.array(listed)}).filter(pa.array(listed >= 0)),
        texts=texts,
        text_row=text_row,
        left_out=pa.concat_tables([*left_out, *strays]),
    )


def _read_parts(
    request: Request, inventory: Inventory
) -> tuple[list[Path], pa.Table, pa.Table, pa.Table, list[pa.Table]]:
    """Read every dataset; files of manifests follow those found in folders."""
    roots, files, said = list(inventory.roots), [inventory.files], []
    for part in request.parts:
        place = Place(name=part.name, root=part.root, inventory=inventory, splits=request.splits)
        if part.layout:
            said.append(READERS[part.layout](place))
        elif not part.is_listing:
            said.append(read_folder(place, part.captions))
        else:
            start = sum(map(len, files))
            more, annotations = read_listing(part.root, part.name)
            files.append(columns(FILES, len(more), root=len(roots), path=more["path"]))
            roots.append(part.root.parent)
            moved = pc.add(array(annotations.images["file"]), start)
            said.append(
                Annotations(
                    images=annotations.images.set_column(3, "file", moved),
                    texts=annotations.texts,
                    left_out=annotations.left_out,
                )
            )
    damaged = columns(
        LEFT_OUT,
        len(inventory.damaged),
        dataset="tars",
        image=strings([d[0] for d in inventory.damaged]),
        reason="damaged-tar",
        message=strings([d[1] for d in inventory.damaged]),
    )
    tables = [pa.concat_tables(getattr(a, n) for a in said) for n in ("images", "texts")]
    return roots, pa.concat_tables(files), *tables, [damaged, *(a.left_out for a in said)]


def _described(request: Request) -> str:
    return ", ".join(f"{p.name} under {p.root}" for p in request.parts)


def _renamed(names: pa.Array, same: dict[str, str]) -> pa.Array:
    if not same:
        return names
    rows = find(names, strings(list(same)))
    others = strings(list(same.values())).take(pa.array(rows, mask=rows < 0))
    return pc.coalesce(others, names)


def _first_file(file: Ints, of_mention: Ints, count: int) -> Ints:
    """Return the file of each image, the first that a dataset has for it, or -1; int64 [count]."""
    result = np.full(count, -1, np.int64)
    there = np.flatnonzero(file >= 0)[::-1]
    result[of_mention[there]] = file[there]  # of several assignments the last one stays, which is the first mention
    return result


def _held_out(
    request: Request, inventory: Inventory, images: pa.Table, of_mention: Ints, names: pa.Array
) -> tuple[Bools, Bools]:
    """Return which images no wanted split has, and which are held out: in a val or test split that is not wanted."""
    split = array(images["split"])
    wanted = pc.is_in(split, value_set=strings(sorted(request.splits))).to_numpy(zero_copy_only=False)
    unwanted = pc.is_in(split, value_set=strings(sorted(set(SPLITS[1:]) - request.splits))).to_numpy(
        zero_copy_only=False
    )
    in_wanted, held_out = np.zeros(len(names), bool), np.zeros(len(names), bool)
    in_wanted[of_mention[wanted]] = True
    held_out[of_mention[unwanted]] = True
    if any(p.layout for p in request.parts):
        splits = karpathy_split(inventory, "coco") | karpathy_split(inventory, "flickr30k")
        outside = strings([i for i, s in splits.items() if s != "train" and s not in request.splits])
        held_out |= pc.is_in(names, value_set=outside).to_numpy(zero_copy_only=False)
    return ~in_wanted & ~held_out, held_out


def _excluded(request: Request, names: pa.Array, paths: pa.Array, called: pa.Array) -> Bools:
    excluded = np.zeros(len(names), bool)
    for path in request.exclude:
        excluded |= are_named(read_excluded(path), names, paths, called)
    return excluded


def _left(mention: pa.Table, rows: Bools, reason: str, message: str | pa.Array) -> pa.Table:
    everything = columns(
        LEFT_OUT, len(mention), dataset=mention["dataset"], image=mention["image"], reason=reason, message=message
    )
    return everything.filter(pa.array(rows))


def _groups(request: Request, roots: list[Path], files: pa.Table, file: Ints) -> Ints:
    """Return the number of each kept image in the corpus; images of the same file or bytes share one."""
    same = twins(roots, files.take(pa.array(file))) if request.merge_duplicates else np.arange(len(file))
    _, first, of_file = np.unique(file, return_index=True, return_inverse=True)
    leader = same[first[of_file.ravel()]]
    return np.unique(leader, return_inverse=True)[1].ravel().astype(np.int64)


def _also(files: pa.Table, file: Ints, kept: Ints, group: Ints, leaders: Ints) -> tuple[pa.Array, Bools]:
    """Return the paths of each image's twins, a list for each group, and which of all images are such twins."""
    is_twin = np.zeros(len(file), bool)
    is_twin[kept] = True
    is_twin[leaders] = False
    rows = np.flatnonzero(is_twin[kept])
    order = rows[np.argsort(group[rows], kind="stable")]
    counts = np.bincount(group[order], minlength=len(leaders))
    paths = array(files["path"]).take(pa.array(file[kept[order]]))
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), paths), is_twin


def _texts(texts: pa.Table, names: pa.Array, row: Ints, missing: Bools) -> tuple[pa.Table, Ints, list[pa.Table]]:
    """Return the texts of kept images in order, each once, their rows, and what names no image or says nothing."""
    of_name = find(array(texts["image"]), names)
    said = pc.utf8_trim_whitespace(pc.coalesce(array(texts["text"]), array(texts["question"]), ""))
    empty = pc.equal(said, "").to_numpy(zero_copy_only=False)
    homeless = (of_name < 0) | missing[of_name]
    rows = np.where(homeless | empty, -1, row[of_name])
    strays = [
        columns(
            LEFT_OUT,
            int(which.sum()),
            dataset=found["source"],
            image=found["image"],
            reason=reason,
            message=found["id"],
        )
        for which, reason in ((homeless, "text-without-image"), (~homeless & empty, "empty-text"))
        for found in [texts.filter(pa.array(which))]
    ]
    order = np.flatnonzero(rows >= 0)
    order = order[np.argsort(rows[order], kind="stable")]
    texts, rows = texts.take(pa.array(order)), rows[order]
    for name in ("text", "question", "answer"):
        column = pc.utf8_trim_whitespace(array(texts[name]))
        texts = texts.set_column(texts.column_names.index(name), name, column)
    once = _first_of_each(texts, rows)
    return texts.take(pa.array(once)), rows[once], strays


def _first_of_each(texts: pa.Table, rows: Ints) -> Ints:
    """Return the first of texts that are the same in all they say and belong to one image, in order."""
    parts = [pc.coalesce(array(texts[n]), "") for n in ("kind", "source", "id", "text", "question", "answer")]
    whole = pc.binary_join_element_wise(pa.array(rows).cast(pa.string()), *parts, "\x1f")
    return np.flatnonzero(find(whole, whole) == np.arange(len(whole)))
