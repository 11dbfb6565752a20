"""From the folder in which a shard was written to its final names, by anybody, and however often one is killed."""

from contextlib import suppress
from pathlib import Path

from oscar_common.files import move
from oscar_extract.folder.claim import Claim, claim_path
from oscar_shards.index import index_path
from oscar_shards.write import rejects_path


def give_names(tar: Path, claim: Claim) -> None:
    """Move the files of a sealed shard to their final names, the index last: a shard with an index is whole.

    Several processes may do it at once, as each file can be moved only once.
    """
    place = tar.parent / claim.place
    index, refused = index_path(tar), rejects_path(tar)

    _move_once(place / tar.name, tar)
    if claim.has_rejects:
        _move_once(place / refused.name, refused)
    elif (place / index.name).exists():
        refused.unlink(missing_ok=True)  # of a shard that was done before

    _move_once(place / index.name, index)
    with suppress(OSError):  # gone, or with something in it
        place.rmdir()


def clear(tar: Path, shard: int, number: int) -> None:
    """Remove the claims on a shard that is done, up to `number`."""
    for earlier in range(1, number + 1):
        claim_path(tar.parent, shard, earlier).unlink(missing_ok=True)


def _move_once(source: Path, path: Path) -> None:
    with suppress(FileNotFoundError):
        move(source, path)
