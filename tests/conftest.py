"""Fixtures that several tests share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_detectors import state_of
from support import photo


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 real JPEG files in two sub-folders: four photos in three sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for number, width in enumerate((256, 320, 400)):
        for name in ("astronaut", "coffee", "chelsea", "rocket"):
            image = photo(name)
            image = image.resize((width, round(image.height * width / image.width)))
            path = folder / f"size{number % 2}" / f"{name}.{number}.jpg"
            path.parent.mkdir(exist_ok=True)
            image.save(path, quality=90)
    return folder


@pytest.fixture(scope="session")
def states() -> dict[str, dict[str, torch.Tensor]]:
    """Random state dicts of the published detectors' families, in their own names; not to be changed."""
    return {family: state_of(family) for family in ("milvlg-caffe", "milvlg-r152", "airsplay", "milvlg-d2", "vinvl")}


@pytest.fixture
def rng() -> np.random.Generator:
    """Numbers that are the same in every run."""
    return np.random.default_rng(0)
