"""int8 features: half the bytes, a bounded error, and nothing further lost by being converted to float32 and back."""

import numpy as np
import pytest
import webdataset
from small_shards import make_samples, write_folder

from oscar_shards.manifest import Layout
from oscar_shards.quantise import are_finite, dequantise, quantise
from oscar_shards.read import open_folder, read_features
from oscar_shards.write import write_shard


def test_the_error_is_at_most_half_a_step_of_the_rows_largest_number(rng):
    features = rng.normal(size=(50, 2048)).astype(np.float16) * np.geomspace(1e-6, 60, 50)[:, None].astype(np.float16)
    values, scales = quantise(features)
    largest = np.abs(features.astype(np.float64)).max(1)
    error = np.abs(dequantise(values, scales).astype(np.float64) - features).max(1)
    assert (error <= largest / 127 * 0.5001).all()
    assert values.dtype == np.int8
    assert (np.abs(values).max(1) == 127)[largest > 0].all()


def test_quantising_what_was_quantised_changes_no_bit(rng):
    features = rng.normal(size=(500, 64)).astype(np.float32) * rng.lognormal(sigma=8, size=(500, 1)).astype(np.float32)
    values, scales = quantise(features)
    exact = values.astype(np.float64) * scales.astype(np.float64)[:, None]
    np.testing.assert_array_equal(dequantise(values, scales), exact)
    again = quantise(dequantise(values, scales))
    np.testing.assert_array_equal(again[0], values)
    np.testing.assert_array_equal(again[1], scales)


def test_rows_of_zeros_and_no_rows_stay_what_they_are():
    values, scales = quantise(np.zeros((2, 5), np.float16))
    assert not values.any()
    assert not scales.any()
    assert quantise(np.zeros((0, 5), np.float16))[0].shape == (0, 5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_seen(dtype, bad):
    array = np.full((3, 7), 65504, dtype)
    assert are_finite(array)
    array[2, 6] = bad
    assert not are_finite(array)


def test_int8_shards_are_half_as_large_and_stock_webdataset_reads_them(tmp_path):
    samples = make_samples(9)
    folder = open_folder(write_folder(tmp_path, samples, dtype="int8"))
    for row, stock, sample in zip(
        folder.table.to_pylist(),
        webdataset.WebDataset(str(folder.tars[0]), shardshuffle=False).decode(),
        samples,
        strict=True,
    ):
        assert stock["features.npy"].dtype == np.int8
        assert row["features_bytes"] * 2 == sample.regions.features.nbytes
        want = stock["features.npy"] * stock["scales.npy"][:, None]
        np.testing.assert_array_equal(read_features(folder.tars[0], row).ravel(), want.ravel())
        np.testing.assert_allclose(want, sample.regions.features, atol=0.02)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(feature_dim=24, max_boxes=20), "image-005: 60 regions; the manifest has at most 20"),
        (Layout(feature_dim=25), r"image-000: features are float16 \(\d, 24\), not float16 \(\d, 25\)"),
    ],
)
def test_a_sample_that_does_not_fit_the_manifest_is_an_error_when_it_is_written(tmp_path, layout, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "a.tar", make_samples(9), layout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.nan, "a feature is not finite"),
        (1e38, "too large for float16"),
        (np.inf, "a feature is not finite"),
    ],
)
def test_features_that_cannot_be_stored_are_an_error_when_they_are_written(tmp_path, dtype, bad, message):
    (sample,) = make_samples(1)
    features = sample.regions.features.astype(np.float32)
    features[1, 1] = bad
    object.__setattr__(sample.regions, "features", features)
    layout = Layout(feature_dim=24, dtype=dtype)
    with pytest.raises(ValueError, match=f"image-000: .*{message}"):
        write_shard(tmp_path / "a.tar", [sample], layout)
