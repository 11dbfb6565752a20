"""Whether the owners of shards live, as one process sees it by its own clock."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from oscar_extract.folder.claim import Claim, Process, claim_path, is_gone, parse_claim, read_bytes

PATIENCE = 60.0  # seconds without a sign of life until an owner counts as dead
LOOKS = 4  # so many looks, at least, are in that time: a file server that hangs makes nobody dead


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What a claim's file held when it was looked at, and for how many seconds it has been the same."""

    content: bytes
    at: float
    idle: float


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A claim, if its file holds one, and whether its owner counts as dead."""

    claim: Claim | None
    is_dead: bool


class Watch:
    """What one process has seen of the claims in a folder.

    clock: seconds that only grow; the process' own.
    """

    def __init__(self, out: Path, process: Process, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._process, self._clock = out, process, clock
        self._seen: dict[str, Sight] = {}

    def look(self, shard: int, number: int) -> Standing:
        """Return how a claim stands; to be asked again and again, as only time tells."""
        path = claim_path(self._out, shard, number)
        content = read_bytes(path)
        claim = parse_claim(content)
        sight = self._sight(path.name, content)
        self._seen[path.name] = sight

        gone = claim is not None and is_gone(claim.owner, self._process)

        return Standing(claim=claim, is_dead=gone or sight.idle >= PATIENCE)

    def _sight(self, name: str, content: bytes) -> Sight:
        before, at = self._seen.get(name), self._clock()
        if before is None or before.content != content:
            return Sight(content=content, at=at, idle=0.0)
        return Sight(content=content, at=at, idle=before.idle + min(at - before.at, PATIENCE / LOOKS))
