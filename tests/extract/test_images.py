"""Every kind of image file becomes upright RGB pixels, or a reject with its reason."""

import csv
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oscar_extract.images import TURNS, RefusedImage, decode, read_image

ODD = Path(os.environ.get("OSCAR_ODD_IMAGES", "absent"))  # a folder of odd files and a manifest.csv that describes them


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture
def corner() -> Image.Image:
    """A 40 x 20 image: red on the left, blue on the right, and green along the top."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20, 0] = pixels[:, 20:, 2] = 255
    pixels[:5] = (0, 255, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied(corner, orientation):
    # The file holds the image turned so that the tag turns it back.
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    stored = corner.transpose(TURNS[inverse]) if inverse in TURNS else corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(encoded(stored, "PNG", exif=exif)), np.asarray(corner))


@pytest.mark.parametrize(
    ("mode", "form", "tolerance"),
    [("RGB", "PNG", 0), ("RGB", "BMP", 0), ("RGB", "TIFF", 0), ("RGB", "PPM", 0), ("P", "PNG", 0), ("P", "GIF", 0),
     ("RGBA", "PNG", 0), ("RGBA", "WEBP", 4), ("CMYK", "TIFF", 0), ("CMYK", "JPEG", 40), ("RGB", "JPEG", 40),
     ("RGB", "JPEG2000", 0)],
)  # fmt: skip
def test_every_mode_and_form_gives_the_same_picture(corner, mode, form, tolerance):
    options = {"lossless": True} if form == "WEBP" else {}
    pixels = decode(encoded(corner.convert(mode), form, **options))
    assert pixels.shape == (20, 40, 3)
    assert pixels.dtype == np.uint8
    difference = np.abs(pixels.astype(int) - np.asarray(corner).astype(int))
    assert np.quantile(difference, 0.85) <= tolerance


def test_progressive_jpeg(corner):
    assert decode(encoded(corner, "JPEG", progressive=True)).shape == (20, 40, 3)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_gray_becomes_three_equal_channels(corner, mode):
    pixels = decode(encoded(corner.convert(mode), "PNG"))
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()
    np.testing.assert_array_equal(pixels[..., 0], np.asarray(corner.convert(mode).convert("L")))


def test_16_bits_are_scaled_not_cut_off():
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    pixels = decode(encoded(Image.fromarray(ramp), "PNG"))
    np.testing.assert_allclose(pixels[..., 0].ravel(), np.arange(256), atol=1)


def test_float_images_are_scaled():
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    np.testing.assert_allclose(decode(encoded(Image.fromarray(ramp), "TIFF"))[..., 0].ravel(), np.arange(256), atol=1)


def test_transparent_pixels_are_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    pixels = decode(encoded(image, "PNG"))
    assert pixels[0, 0].tolist() == [0, 0, 255]
    assert pixels[1, 1].tolist() == [255, 255, 255]


def test_an_animation_gives_its_first_frame(corner):
    frames = [corner.convert("P"), Image.new("P", corner.size)]
    np.testing.assert_array_equal(
        decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])), np.asarray(corner)
    )


def test_damage_is_refused_with_its_reason(corner, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    whole = encoded(noise, "JPEG")
    bomb = encoded(Image.new("L", (1, 1)), "GIF")
    bomb = bomb[:6] + b"\xff\xff\xff\xff" + bomb[10:]
    for content, reason in (
        (whole[: len(whole) // 2], "truncated"),
        (b"", "not-an-image"),
        (b"<html>404</html>", "not-an-image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not-an-image"),
        (bomb, "bomb"),
    ):
        path = tmp_path / "x.jpg"
        path.write_bytes(content)
        with pytest.raises(RefusedImage) as refused:
            read_image(path)
        assert refused.value.reason == reason
        assert str(refused.value)
    with pytest.raises(RefusedImage) as refused:
        read_image(tmp_path / "absent.jpg")
    assert refused.value.reason == "unreadable"


@pytest.mark.skipif(not ODD.is_dir(), reason="an extra: needs a folder of odd image files (OSCAR_ODD_IMAGES)")
def test_odd_files():
    """Pillow's own odd files. One for which Pillow raises, and then shows two thirds if asked again, is refused too."""
    refused = set()
    with (ODD / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        try:
            pixels, _ = read_image(ODD / row["file"])
        except RefusedImage:
            refused.add(row["file"])
        else:
            width, height = map(int, row["size"].split("x"))
            turned = row["exif_orientation"] in ("5", "6", "7", "8")
            assert pixels.shape == ((width, height, 3) if turned else (height, width, 3))
    assert refused == {r["file"] for r in rows if r["decode"] != "ok"} | {"broken_data_stream.png"}
