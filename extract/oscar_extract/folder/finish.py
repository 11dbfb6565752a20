"""A shard that a process holds, from its samples to its final names."""

import shutil
from collections.abc import Iterable

from oscar_common.sample import Sample
from oscar_extract.folder.naming import clear, give_names
from oscar_extract.folder.remaining import is_newly_done
from oscar_extract.folder.stopping import STOP
from oscar_extract.folder.take import Held
from oscar_extract.messages import OpenShard
from oscar_shards.manifest import Layout
from oscar_shards.write import Reject, write_shard


class TakenOver(Exception):
    """Another process has taken a shard over, as this one gave no sign of life for long."""


def finish_shard(held: Held, open_shard: OpenShard, items: Iterable[Sample | Reject], layout: Layout) -> bool:
    """Write a shard and give it its names; False if another process has done so, or is about to.

    Raises:
        OSError: the disk is full, or refuses.
    """
    if is_newly_done(held.tar, open_shard):  # in the moment before it was taken
        clear(held.tar, held.shard, held.number)
        return False

    try:
        write_shard(held.place / held.tar.name, items, layout)
    except TakenOver:
        return False
    except FileNotFoundError:  # by whoever took it over and has done it, the folder was removed
        if held.place.exists():
            raise
        return False

    with STOP.deferred():
        is_owner = held.seal()
        if is_owner and not is_newly_done(held.tar, open_shard):
            give_names(held.tar, held.claim)
        if is_owner:
            clear(held.tar, held.shard, held.number)
            shutil.rmtree(held.place, ignore_errors=True)  # empty, unless the shard was done before

    return is_owner
