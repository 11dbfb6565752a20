"""Fixtures for the tests of stage 2."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_shards import make_samples, write_folder

from oscar_common.sample import Sample
from oscar_train.data.corpus import Corpus
from oscar_train.data.stream import Stream, open_stream
from oscar_train.data.texts.tokens import Tokenizer, load_tokenizer


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from threads, and a busy machine loses much by them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    return make_samples()


@pytest.fixture(scope="session")
def shards(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("train") / "shards", samples)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(None)


@pytest.fixture(scope="session")
def stream(shards: Path, tokenizer: Tokenizer) -> Iterator[Stream]:
    with open_stream([str(shards)], batch_size=16, tokenizer=tokenizer) as opened:
        yield opened


@pytest.fixture(scope="session")
def corpus(stream: Stream) -> Corpus:
    return stream.corpus
