"""Where the embedding of regions begins: as near to the embeddings of their tags as a linear map can bring it.

Tags are Oscar's anchors: what the regions and the words have in common (section 3). An embedding with random weights
has to find out from the losses which region is which tag, and has not after hundreds of steps (docs/objectives.md); the
linear part of that is one least squares problem. The model is what it would be otherwise, only its weights begin
elsewhere.
"""

from collections.abc import Iterator
from contextlib import suppress
from itertools import compress, groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from oscar_train.batch import BOX, MAX_TOKENS
from oscar_train.data.batch_buffer import make_batch_buffer, put_regions
from oscar_train.data.corpus import Corpus
from oscar_train.data.reading.prefetch import fetching
from oscar_train.data.stream import Stream
from oscar_train.data.texts.ragged import Ints
from oscar_train.data.texts.tokens import Tokenizer
from oscar_train.model.oscar import OscarForPreTraining

IMAGES = 1024  # whose regions are looked at: at 36 regions an image 18 for each of 2,054 features
CHUNK = 64  # images that are read at once
RIDGE = 0.03  # of the features' mean variance, added to that of each: features that few regions have mean little
LEAST = 1e-9  # of their mean square, at least: regions may be all alike, but for the rounding


def anchor(model: OscarForPreTraining, stream: Stream) -> str:
    """Set `img_embedding` to the ridge regression of the embeddings of tags on [v'; z] (and its LayerNorm, if it has
    one, to that of the text's embeddings); return what was done in a few words.

    A tag's embedding is that of its tokens as q, at q's mean position. Regions are those of the first images of the
    stream whose tags are one for each region; if there are none the model stays as it is.
    """
    names, (squares, counts, sums) = _moments(stream)
    if len(names) < 2:
        return "bert.img_embedding stays random, as no regions have tags"

    bert, layer = model.bert, model.bert.img_embedding
    with torch.no_grad():
        tags = _embedded(model, names, stream.corpus.tokenizer).double()
        if bert.use_img_layernorm:
            bert.LayerNorm.load_state_dict(bert.embeddings.LayerNorm.state_dict())
        else:
            tags = bert.embeddings.LayerNorm(tags.float()).double()

        size = layer.in_features  # of a model that takes 4 numbers of z, the last two are left out
        weight, bias, explained = _regression(squares[:size, :size], counts, sums[:, :size], tags)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)

    count = int(counts.sum())
    return f"bert.img_embedding begins at the tags of {count:,} regions ({explained:.0%} of their variance)"


def _embedded(model: OscarForPreTraining, names: list[str], tokenizer: Tokenizer) -> Tensor:
    """Return the embeddings of tags before their LayerNorm, [C, H]: the mean of each one's tokens."""
    embeddings = model.bert.embeddings
    tokens = tokenizer(names, MAX_TOKENS)
    ids = torch.from_numpy(tokens.values.astype(np.int64))
    words = embedding_bag(ids, embeddings.word_embeddings.weight, torch.from_numpy(tokens.offsets[:-1]), mode="mean")
    place = embeddings.position_embeddings.weight[:MAX_TOKENS].mean(0)
    return words + embeddings.token_type_embeddings.weight[1] + place


def _moments(stream: Stream) -> tuple[list[str], tuple[Tensor, Tensor, Tensor]]:
    """Return C tags; and of the regions x = [v'; z] that have one the sum of x x^T, [P + 6, P + 6], how many have each
    tag, [C], and the sum of x over these, [C, P + 6]; float64."""
    codes: dict[str, int] = {}
    size = stream.corpus.feature_dim + BOX
    squares, sums = torch.zeros(size, size, dtype=torch.float64), torch.zeros(0, size, dtype=torch.float64)
    counts = torch.zeros(0, dtype=torch.float64)

    for tags, regions in _tagged_regions(stream):
        code = torch.tensor([codes.setdefault(tag, len(codes)) for tag in tags], dtype=torch.int64)
        new = len(codes) - len(counts)
        counts = pad(counts, (0, new)).index_add(0, code, torch.ones(len(code), dtype=torch.float64))
        sums = pad(sums, (0, 0, 0, new)).index_add(0, code, regions)
        squares.addmm_(regions.T, regions)

    return list(codes), (squares, counts, sums)


def _regression(squares: Tensor, counts: Tensor, sums: Tensor, tags: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return weight [H, P + 6] and bias [H] of the ridge regression of tags [C, H], and R^2; see `_moments`."""
    total, size = counts.sum(), len(squares)
    mean, tag = sums.sum(0) / total, counts @ tags / total
    covariance = squares - total * mean[:, None] * mean
    across = sums.T @ tags - total * mean[:, None] * tag
    ridge = (RIDGE * covariance.trace() / size).clamp_min(float(LEAST * squares.trace() / size))
    weight = torch.linalg.solve(covariance + ridge * torch.eye(size, dtype=torch.float64), across)
    residual = (weight * (covariance @ weight - 2 * across)).sum()
    variance = counts @ (tags - tag).square().sum(1)
    explained = float(-residual / variance.clamp_min(torch.finfo(torch.float32).tiny))

    return weight.T, tag - mean @ weight, explained


def _tagged_regions(stream: Stream) -> Iterator[tuple[list[str], Tensor]]:
    """Yield the tags of regions, and the regions [v'; z], float64 [R, P + 6]; those of some images at a time."""
    tags = _region_tags(stream.corpus, np.sort(stream.first_images(IMAGES)))
    buffer = make_batch_buffer(CHUNK, stream.corpus.feature_dim)
    listed = np.array(list(tags), np.int64)
    shards = np.unique(stream.corpus.images.shard[listed]).tolist()

    with fetching(stream.reader.tars, shards):
        for begin in range(0, len(listed), CHUNK):
            images = listed[begin : begin + CHUNK]
            part = buffer.rows(0, len(images))
            stream.reader.read(images, part.slots)
            put_regions(stream.reader, images, part)
            region_mask = part.batch.region_mask
            regions = torch.cat([part.batch.features[region_mask].double(), part.batch.z[region_mask].double()], 1)
            counts = part.slots.counts.tolist()
            names = [tag for image, count in zip(images.tolist(), counts, strict=True) for tag in tags[image][:count]]
            whole = regions.isfinite().all(1)
            yield list(compress(names, whole.tolist())), regions[whole]


def _region_tags(corpus: Corpus, images: Ints) -> dict[int, list[str]]:
    """Return the tags of images, which rise, that have one for each of their regions."""
    tags_of: dict[int, list[str]] = {}
    for shard, group in groupby(images.tolist(), lambda image: corpus.images.shard[image]):
        source, number = corpus.place(shard)
        first, chosen_images = int(corpus.shard_images[shard]), set(group)
        with suppress(ValueError):  # an index that is damaged, with --skip-corrupt: the rows before that are here
            for rows in source.index(number)[1]:
                positions = range(first, first := first + len(rows))
                for image in chosen_images.intersection(positions):
                    tags = rows.column("tags")[image - positions.start].as_py() or []
                    if len(tags) == corpus.images.num_boxes[image] and all(tags):
                        tags_of[image] = tags

    return tags_of
