"""The tables that readers fill and the corpus joins: Arrow columns, as millions of rows are too many for objects."""

from dataclasses import dataclass, field

import pyarrow as pa

FILES = pa.schema(
    [
        ("root", pa.int32()),  # counts in Inventory.roots
        ("path", pa.string()),  # relative to the root; in a tar: the tar's path, a slash, the member's name
        ("raw", pa.binary()),  # the path's bytes if they are no UTF-8, else null; of a tar member, the tar's path's
        ("offset", pa.int64()),  # of the file's bytes in the tar, else null
        ("size", pa.int64()),  # of a tar member, else null
        ("url", pa.string()),  # where a downloader says that it is from
        ("text", pa.string()),  # the caption beside it in its tar
        ("fault", pa.string()),  # why what is beside it there cannot be read
    ]
)
IMAGES = pa.schema(
    [
        ("dataset", pa.string()),
        ("image", pa.string()),  # "source/id", the same in all datasets that have the image
        ("name", pa.string()),  # what the dataset calls its file
        ("file", pa.int64()),  # row of FILES, -1 if there is none
        ("split", pa.string()),  # train, val or test
        ("message", pa.string()),  # why there is no file, where that is known
    ]
)
LEFT_OUT = pa.schema(
    [("dataset", pa.string()), ("image", pa.string()), ("reason", pa.string()), ("message", pa.string())]
)


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """What one dataset says: tables of the schemas IMAGES, TEXTS and LEFT_OUT (what it could not use)."""

    images: pa.Table
    texts: pa.Table
    left_out: pa.Table = field(default_factory=lambda: LEFT_OUT.empty_table())
