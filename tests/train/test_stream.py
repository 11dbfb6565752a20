"""The stream: every triple once an epoch, the same for every batch size and starting point."""

from dataclasses import fields

import numpy as np
import torch

from oscar_shards.read import ShardFolder
from oscar_train.corpus import Corpus
from oscar_train.regions import RegionReader
from oscar_train.stream import Batch, Stream


def positions(stream: Stream, steps: int) -> np.ndarray:
    return np.concatenate([t for step in range(steps) for _, _, t in stream.segments(step)])


def test_every_epoch_is_every_triple_once_and_nothing_is_dropped(corpus: Corpus, folder: ShardFolder):
    n = len(corpus)
    assert n % 16
    for batch_size in (16, 2, n, 3 * n + 1):
        stream = Stream(corpus, RegionReader(folder), seed=1, batch_size=batch_size)
        seen = positions(stream, -(-3 * n // batch_size))[: 3 * n].reshape(3, n)
        for epoch in seen:
            np.testing.assert_array_equal(np.sort(epoch), np.arange(n))
        assert not (seen[0] == seen[1]).all()
        np.testing.assert_array_equal(seen[2], stream._order(2))


def test_the_text_of_a_position_does_not_depend_on_the_batch_size(corpus: Corpus, folder: ShardFolder):
    texts = []
    for batch_size, steps in ((16, 21), (48, 7), (336, 1)):
        stream = Stream(corpus, RegionReader(folder), seed=1, batch_size=batch_size)
        parts = [stream.text(step) for step in range(steps)]
        texts.append({f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(parts[0])})
    for other in texts[1:]:
        for name, array in texts[0].items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)


def copied(batch: Batch) -> dict[str, torch.Tensor]:
    return {f.name: getattr(batch, f.name).clone() for f in fields(Batch)}


def test_a_batch_is_the_same_read_ahead_or_alone_from_any_start(stream: Stream):
    ahead = [copied(batch) for batch in stream.batches(0, 9)]
    for first in (0, 4, 8):
        for step, batch in enumerate(stream.batches(first, 9), first):
            for name, tensor in copied(batch).items():
                assert torch.equal(tensor, ahead[step][name]), (step, name)
    alone = copied(stream.batch(5, stream.reader.slots(16)))
    assert all(torch.equal(tensor, ahead[5][name]) for name, tensor in alone.items())


def test_shapes_types_and_masks(stream: Stream):
    batch = stream.batch(0, stream.reader.slots(16))
    shapes = {f.name: (tuple(getattr(batch, f.name).shape), getattr(batch, f.name).dtype) for f in fields(Batch)}
    assert shapes == {
        "input_ids": ((16, 35), torch.int64),
        "token_type_ids": ((16, 35), torch.int64),
        "attention_mask": ((16, 85), torch.bool),
        "mlm_labels": ((16, 35), torch.int64),
        "features": ((16, 50, 24), torch.float16),
        "z": ((16, 50, 6), torch.float32),
        "match_labels": ((16,), torch.int64),
    }
    images = stream.corpus.image[positions(stream, 1)]
    counts = stream.reader.folder.table.column("num_boxes").to_numpy()[images]
    assert batch.attention_mask[:, 35:].sum(1).tolist() == np.minimum(counts, 50).tolist()
    assert torch.equal(batch.attention_mask[:, :35], batch.input_ids != 0)


def test_the_epoch_is_that_of_the_first_triple(stream: Stream):
    n = len(stream.corpus)
    assert [stream.epoch(s) for s in (0, (n - 1) // 16, (n - 1) // 16 + 1)] == [0, 0, 1]
