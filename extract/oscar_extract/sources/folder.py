"""Anyone's own folder: every image under it and in its tars is one of the job, and a caption file names them."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oscar_common.errors import UsageError
from oscar_common.tables import TEXTS, array, columns, once, without_extension
from oscar_extract.images import EXTENSIONS
from oscar_extract.sources.captions import read_captions
from oscar_extract.sources.inventory import Bools
from oscar_extract.sources.place import Place
from oscar_extract.sources.tables import IMAGES, LEFT_OUT, Annotations


def read_folder(place: Place, captions: str | None = None) -> Annotations:
    """Take all images of a folder, with the texts of `captions`, or else those beside the images in their tars.

    Raises:
        UsageError: no image, or captions of other images.
    """
    which = place.inventory.under(place.root)
    if not which.any():
        endings = " ".join(sorted(EXTENSIONS - {""}))
        raise UsageError(
            f"--images {place.root}: no image in it, only {place.inventory.others} other files; looked for {endings}"
            f"{place.inventory.damage}"
        )

    return read_files(place, which, captions)


def read_files(place: Place, which: Bools, captions: str | None = None) -> Annotations:
    """Take some of the job's files, bool [F], as images; see `read_folder`."""
    rows = np.flatnonzero(which)
    files = place.inventory.files.take(pa.array(rows))
    paths = array(files["path"])
    ids = make_ids(paths)
    image = pc.binary_join_element_wise(place.name, ids, "/")
    images = columns(IMAGES, len(rows), dataset=place.name, image=image, name=paths, file=rows, split="train")
    if captions:
        texts, left_out = read_captions(captions, place, paths, ids)
    else:
        texts = columns(TEXTS, len(rows), image=image, kind="caption", source=place.name, id="0", text=files["text"])
        left_out = _undecoded(place, files)
        texts = texts.filter(texts["text"].is_valid())

    gone = _dead(place)
    return Annotations(
        images=pa.concat_tables([images, gone.images]), texts=pa.concat_tables([texts, gone.texts]), left_out=left_out
    )


def _undecoded(place: Place, files: pa.Table) -> pa.Table:
    """Return the images that have no text because what is beside them in their tars is in an unknown encoding."""
    lost = files.filter(pc.and_(array(files["fault"]).is_valid(), array(files["text"]).is_null()))
    return columns(
        LEFT_OUT, len(lost), dataset=place.name, image=lost["path"], reason="encoding", message=lost["fault"]
    )


def make_ids(paths: pa.Array) -> pa.Array:
    """Return ids that no two files share: the path without its extension, or all of it where a.jpg and a.png are there.

    A tar member's id is 00042/000420017 for 00042.tar/000420017.jpg.
    """
    short = without_extension(pc.replace_substring(paths, ".tar/", "/"))
    clash = pc.or_(once(short).is_null(), pc.and_(pc.is_in(short, value_set=paths), pc.not_equal(short, paths)))
    return pc.if_else(clash, paths, short)


def _dead(place: Place) -> Annotations:
    """Return the images that img2dataset could not download; they are missing, with its reason."""
    dead = place.dead
    image = pc.binary_join_element_wise(place.name, array(dead["image"]), "/")
    images = columns(
        IMAGES,
        len(dead),
        dataset=place.name,
        image=image,
        name=dead["url"],
        file=-1,
        split="train",
        message=dead["message"],
    )
    texts = columns(TEXTS, len(dead), image=image, kind="caption", source=place.name, id="0", text=dead["text"])

    return Annotations(images=images, texts=texts.filter(texts["text"].is_valid()))
