"""Caption files joined to the images of a folder by whatever name they use for them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from oscar_common.captions import FLAG, match, read_beside, read_texts
from oscar_common.errors import UsageError
from oscar_common.tables import array, columns
from oscar_extract.sources.place import Place
from oscar_extract.sources.tables import LEFT_OUT

BESIDE = ("txt", ".txt", "*.txt")


def read_captions(captions: str, place: Place, paths: pa.Array, ids: pa.Array) -> tuple[pa.Table, pa.Table]:
    """Read `--captions` and join it to the images, given their paths and ids.

    Return tables of the schemas TEXTS and LEFT_OUT: texts that name no image, or whose image is ambiguous.

    Raises:
        UsageError: no such file, a form that is not known, or no text that names any image.
    """
    path = Path(captions)
    if captions in BESIDE:
        source, texts = "txt", read_beside(place.root, paths, "txt")
    elif path.is_dir():
        source, texts = path.name, read_beside(path, paths, path.name)
    elif path.is_file():
        source, texts = path.stem, read_texts(path, path.stem)
    else:
        raise UsageError(f"{FLAG} {captions}: no such file (or say txt for .txt files beside the images)")

    images = array(texts["image"])
    rows = match(images, (paths, ids), paths, ids)
    if not (rows >= 0).any():
        raise UsageError(
            f"{FLAG} {captions}: none of its {len(texts)} texts names an image under {place.root} (images there are "
            f"like {paths[0].as_py()!r}); give the captions of these images, or another --images"
        )

    image = pc.binary_join_element_wise(place.name, ids.take(pa.array(rows, mask=rows < 0)), "/")
    known = pa.array(rows >= 0)
    strays = texts.filter(pc.invert(known))
    left_out = columns(
        LEFT_OUT, len(strays), dataset=source, image=strays["image"], reason="text-without-image", message=told(strays)
    )

    return texts.set_column(0, "image", image).filter(known), left_out


def told(texts: pa.Table) -> pa.Array:
    """Return what each row of the schema TEXTS says, as one string."""
    return pc.coalesce(array(texts["text"]), array(texts["question"]), "")
