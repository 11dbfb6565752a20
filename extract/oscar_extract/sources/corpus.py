"""The corpus: several datasets joined over one set of images, each image once, with all its texts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oscar_common.errors import UsageError
from oscar_common.tables import Ints, array, columns, find, strings
from oscar_extract.sources.coco import FILES as COCO
from oscar_extract.sources.coco import read_coco
from oscar_extract.sources.downloads import SBU_JSON, SBU_URLS, read_cc, read_sbu
from oscar_extract.sources.duplicates import twins
from oscar_extract.sources.exclude import are_named, read_excluded
from oscar_extract.sources.flickr30k import TOKENS, read_flickr30k
from oscar_extract.sources.folder import read_folder
from oscar_extract.sources.genome import GQA, VG_QA, coco_twins, read_gqa, read_vg_qa
from oscar_extract.sources.inventory import Bools, Inventory, Listing, list_files
from oscar_extract.sources.listing import is_listing, read_listing
from oscar_extract.sources.place import SPLITS, Place
from oscar_extract.sources.remote import RemoteTars, Root
from oscar_extract.sources.splits import karpathy_splits
from oscar_extract.sources.tables import FILES, LEFT_OUT, Annotations
from oscar_extract.sources.vqa import QUESTIONS, read_vqa

READERS: dict[str, Callable[[Place], Annotations]] = {
    "coco": read_coco,
    "cc": read_cc,
    "sbu": read_sbu,
    "flickr30k": read_flickr30k,
    "gqa": read_gqa,
    "vqa": read_vqa,
    "vg-qa": read_vg_qa,
}
LISTS: dict[str, tuple[str, ...]] = {  # files by which a dataset's folder is known
    "coco": (COCO, r"(^|/)dataset_coco\.json$"),
    "cc": (r"(?i)\.tsv$",),
    "sbu": (SBU_URLS, SBU_JSON),
    "flickr30k": (TOKENS, r"(^|/)dataset_flickr(8|30)k\.json$"),
    "gqa": (GQA,),
    "vqa": (QUESTIONS,),
    "vg-qa": (VG_QA,),
}
MISSING = ("missing", "dead-link", "damaged-tar")  # reasons that count against --max-reject-fraction


@dataclass(frozen=True, kw_only=True)
class Part:
    """One dataset of a job: a published layout under `root`, or with layout None, a folder or a manifest file."""

    name: str
    layout: str | None
    root: Path
    captions: str | None = None
    remote: RemoteTars | None = None  # the tars behind a URL, for which `root` only stands

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
    remote: RemoteTars | None = None  # the tars behind a URL, for which `images` only stands
    beside: tuple[Path, ...] = ()  # folders of the datasets whose images those of the job share
    splits: frozenset[str] = frozenset({"train"})
    exclude: tuple[Path, ...] = ()
    merge_duplicates: bool = True
    out: Path | None = None

    @property
    def remotes(self) -> dict[Path, RemoteTars]:
        """The tars behind URLs, by the path that stands for each."""
        places = [(p.root, p.remote) for p in self.parts] + [(self.images or Path(), self.remote)]
        return {path: remote for path, remote in places if remote}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Images that have a file, each once, and their texts.

    image: "source/id" [N]. files: their rows of the schema FILES. also: the paths of other files with the same bytes,
    a list for each image. mentions: which dataset (name) lists which image (row), as two columns. texts: a table of
    the schema TEXTS, sorted by `text_row`, the image's row. left_out: a table of the schema LEFT_OUT.
    """

    roots: list[Root]
    image: pa.Array
    files: pa.Table
    also: pa.Array
    mentions: pa.Table
    texts: pa.Table
    text_row: Ints
    left_out: pa.Table
    lost: int  # images behind the damage of tars, about


def find_files(request: Request) -> Listing:
    """List what lies in the folders of a job."""
    walked = [p for p in request.parts if not p.is_listing]
    further = ([request.images] if request.images else []) + list(request.beside)
    folders = list(dict.fromkeys([p.root for p in walked] + further))
    inner = request.out if request.out and request.out.resolve() not in {f.resolve() for f in folders} else None
    return list_files(folders, walked[0].flag if walked else "--images", inner, request.remotes)


def read_corpus(request: Request, inventory: Inventory) -> Corpus:
    """Read what the datasets say of the files found, and join it all.

    Raises:
        UsageError: something is not there, cannot be read, or leaves no image.
    """
    published = any(part.layout for part in request.parts)
    karpathy = karpathy_splits(inventory) if published else {}
    same = coco_twins(inventory) if published else {}
    roots, files, images, texts, left_out = _read_parts(request, inventory, karpathy)
    called = array(images["image"])
    images = images.set_column(1, "image", _renamed(called, same))
    texts = texts.set_column(0, "image", _renamed(array(texts["image"]), same))
    names = pc.unique(array(images["image"]))
    of_mention = find(array(images["image"]), names)
    file = _first_file(array(images["file"]).to_numpy(), of_mention, len(names))
    mention = images.take(pa.array(np.unique(of_mention, return_index=True)[1]))
    unwanted, held_out = _held_out(request, karpathy, images, of_mention, names)
    excluded = _excluded(request, files, images, called, of_mention, len(names))
    present = np.flatnonzero((file >= 0) & ~unwanted)
    group = _groups(request, roots, files, file[present])
    held_out, excluded = (_with_copies(which, present, group) for which in (held_out, excluded))
    missing = (file < 0) & ~held_out & ~excluded & ~unwanted
    keep = ((file >= 0) & ~held_out & ~excluded & ~unwanted)[present]
    if not keep.any():
        raise _nothing_left(request, missing, held_out, excluded, inventory.damage)

    kept_images, group = present[keep], np.unique(group[keep], return_inverse=True)[1].ravel()
    row = np.full(len(names), -1, np.int64)
    row[kept_images] = group
    # Groups are numbered by their first image, so the corpus keeps the order in which the datasets name images.
    leaders = kept_images[np.unique(group, return_index=True)[1]]
    also, is_twin = _also(files, file, kept_images, group, leaders)
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
        left_out=pa.concat_tables([*left_out, *_left_out(mention, held_out, excluded, missing, is_twin), *strays]),
        lost=sum(d.lost for d in inventory.damaged),
    )


def _left_out(
    mention: pa.Table, held_out: Bools, excluded: Bools, missing: Bools, is_twin: Bools
) -> Iterator[pa.Table]:
    """Yield tables of the schema LEFT_OUT, given the row of IMAGES that names each image first."""
    is_dead = array(mention["message"]).is_valid().to_numpy(zero_copy_only=False)
    for rows, reason, message in (
        (held_out, "held-out", "of a validation or test split, or the same bytes as an image of one"),
        (excluded & ~held_out, "excluded", "named by --exclude, or the same bytes as an image that is"),
        (missing & ~is_dead, "missing", None),
        (missing & is_dead, "dead-link", None),
        (is_twin, "duplicate", "its bytes are those of another image, which has its texts"),
    ):
        rows_left_out = mention.filter(pa.array(rows))
        table_columns = {"dataset": rows_left_out["dataset"], "image": rows_left_out["image"], "reason": reason}
        yield columns(
            LEFT_OUT,
            len(rows_left_out),
            **table_columns,
            message=message or rows_left_out["name" if reason == "missing" else "message"],
        )


def _nothing_left(request: Request, missing: Bools, held_out: Bools, excluded: Bools, damage: str) -> UsageError:
    counts = (("missing", missing), ("held out", held_out), ("excluded", excluded))
    reasons = ", ".join(f"{int(n.sum())} {reason}" for reason, n in counts)
    hint = "; --splits takes other splits" if held_out.any() else ""
    return UsageError(f"no image is left of the {len(missing)} of {_described(request)}: {reasons}{damage}{hint}")


def _read_parts(
    request: Request, inventory: Inventory, karpathy: dict[str, dict[str, str]]
) -> tuple[list[Root], pa.Table, pa.Table, pa.Table, list[pa.Table]]:
    """Read every dataset; files of manifests follow those found in folders."""
    roots: list[Root] = [request.remotes.get(root, root) for root in inventory.roots]
    files, parts = [inventory.files], []
    for part in request.parts:
        place = _place(request, part, inventory, karpathy)
        if part.layout:
            parts.append(READERS[part.layout](place))
        elif not part.is_listing:
            parts.append(read_folder(place, part.captions))
        else:
            start = sum(map(len, files))
            more, annotations = read_listing(part.root, part.name)
            files.append(columns(FILES, len(more), root=len(roots), path=more["path"]))
            roots.append(part.root.parent)
            moved = pc.add(array(annotations.images["file"]), start)
            parts.append(
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
        image=strings([d.tar for d in inventory.damaged]),
        reason="damaged-tar",
        message=strings([f"{d.fault}; images that cannot be used: about {d.lost:,}" for d in inventory.damaged]),
    )
    tables = [pa.concat_tables(getattr(a, n) for a in parts) for n in ("images", "texts")]
    return roots, pa.concat_tables(files), *tables, [damaged, *(a.left_out for a in parts)]


def _place(request: Request, part: Part, inventory: Inventory, karpathy: dict[str, dict[str, str]]) -> Place:
    other_roots = [p.root for p in request.parts if p.layout and p.name != part.name]
    shared = any(part.root.is_relative_to(other) or other.is_relative_to(part.root) for other in other_roots)
    return Place(
        name=part.name,
        root=part.root,
        inventory=inventory,
        splits=request.splits,
        shared=shared,
        alone=len(request.parts) == 1,
        karpathy=karpathy,
    )


def _described(request: Request) -> str:
    return ", ".join(f"{p.name} under {p.remote or p.root}" for p in request.parts)


def _renamed(names: pa.Array, same: dict[str, str]) -> pa.Array:
    if not same:
        return names
    rows = find(names, strings(list(same)))
    new_names = strings(list(same.values())).take(pa.array(rows, mask=rows < 0))
    return pc.coalesce(new_names, names)


def _first_file(file: Ints, of_mention: Ints, count: int) -> Ints:
    """Return the file of each image, the first that a dataset has for it, or -1; int64 [count]."""
    result = np.full(count, -1, np.int64)
    present = np.flatnonzero(file >= 0)[::-1]
    result[of_mention[present]] = file[present]  # of several assignments the last one stays, which is the first mention
    return result


def _held_out(
    request: Request, karpathy: dict[str, dict[str, str]], images: pa.Table, of_mention: Ints, names: pa.Array
) -> tuple[Bools, Bools]:
    """Return which images no wanted split has, and which are held out: in a val or test split that is not wanted."""
    split = array(images["split"])
    is_held_out = pc.is_in(split, value_set=strings(sorted(request.splits))).to_numpy(zero_copy_only=False)
    unwanted = pc.is_in(split, value_set=strings(sorted(set(SPLITS[1:]) - request.splits))).to_numpy(
        zero_copy_only=False
    )
    in_wanted, held_out = np.zeros(len(names), bool), np.zeros(len(names), bool)
    in_wanted[of_mention[is_held_out]] = True
    held_out[of_mention[unwanted]] = True
    splits = [item for of_family in karpathy.values() for item in of_family.items()]
    outside = strings([image for image, split in splits if split != "train" and split not in request.splits])
    held_out |= pc.is_in(names, value_set=outside).to_numpy(zero_copy_only=False)

    return ~in_wanted & ~held_out, held_out


def _excluded(
    request: Request, files: pa.Table, images: pa.Table, called: pa.Array, of_mention: Ints, count: int
) -> Bools:
    """Return which images are named by --exclude, under any of the names that the datasets have for them; [count]."""
    excluded = np.zeros(count, bool)
    if request.exclude:
        file = array(images["file"]).to_numpy()
        paths = array(files["path"]).take(pa.array(file, mask=file < 0))
        for path in request.exclude:
            named = read_excluded(path)
            for image in (called, array(images["image"])):
                excluded[of_mention[are_named(named, image, paths, array(images["name"]))]] = True

    return excluded


def _with_copies(which: Bools, there: Ints, group: Ints) -> Bools:
    """Return `which`, and further those whose bytes are the same as one's of these."""
    copies = which.copy()
    copies[there] |= np.isin(group, group[which[there]])
    return copies


def _groups(request: Request, roots: list[Root], files: pa.Table, file: Ints) -> Ints:
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
    empty = _is_empty(pc.coalesce(array(texts["text"]), array(texts["question"]), ""))
    empty |= _is_empty(array(texts["answer"])) & pc.equal(array(texts["kind"]), "qa").to_numpy(zero_copy_only=False)
    homeless = (of_name < 0) | missing[of_name]
    rows = np.where(homeless | empty, -1, row[of_name])
    strays = [
        columns(
            LEFT_OUT,
            int(which.sum()),
            dataset=selected["source"],
            image=selected["image"],
            reason=reason,
            message=selected["id"],
        )
        for which, reason in ((homeless, "text-without-image"), (~homeless & empty, "empty-text"))
        for selected in [texts.filter(pa.array(which))]
    ]
    order = np.flatnonzero(rows >= 0)
    order = order[np.argsort(rows[order], kind="stable")]
    texts, rows = texts.take(pa.array(order)), rows[order]

    for name in ("text", "question", "answer"):
        column = pc.utf8_trim_whitespace(array(texts[name]))
        texts = texts.set_column(texts.column_names.index(name), name, column)

    once = _first_of_each(texts, rows)
    return texts.take(pa.array(once)), rows[once], strays


def _is_empty(texts: pa.Array) -> Bools:
    empty: Bools = pc.equal(pc.utf8_trim_whitespace(texts), "").fill_null(False).to_numpy(zero_copy_only=False)
    return empty


def _first_of_each(texts: pa.Table, rows: Ints) -> Ints:
    """Return the first of texts that are the same in all they say and belong to one image, in order."""
    several = np.flatnonzero(np.bincount(rows)[rows] > 1)  # most images have but one
    chosen = texts.take(pa.array(several))
    parts = [pc.coalesce(array(chosen[n]), "") for n in ("kind", "source", "id", "text", "question", "answer")]
    whole = pc.binary_join_element_wise(pa.array(rows[several]).cast(pa.string()), *parts, "\x1f")
    keep = np.ones(len(rows), bool)
    keep[several] = find(whole, whole) == np.arange(len(whole))

    return np.flatnonzero(keep)
