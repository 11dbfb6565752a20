"""An image file to upright RGB pixels, whatever its format, or the reason why not.

`python -m oscar_extract.images` decodes one image from stdin to an .npy file on stdout, for `decode_apart`.
"""

import hashlib
import io
import os
import stat
import subprocess
import sys
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

# No format that runs an interpreter (EPS) or that is no photograph; an MPO opens as the JPEG that it begins with.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "TGA", "AVIF")
MAX_BYTES = 1 << 29
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Image.init()
OPENED = [name for name in FORMATS if name in Image.OPEN]
# A file without an extension may be an image as well.
EXTENSIONS = frozenset({e for e, name in Image.registered_extensions().items() if name in FORMATS} | {""})
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # twice the limit is an error, and refused
warnings.filterwarnings("ignore", module="PIL")  # damaged metadata around pixels that decode


class RefusedImage(Exception):
    """An image that cannot be used: a reason to count by, and what was found."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_image(
    path: str | os.PathLike[str], offset: int = 0, size: int | None = None
) -> tuple[npt.NDArray[np.uint8], str]:
    """Return the pixels, uint8 [H, W, 3] RGB with the EXIF orientation applied, and the SHA-256 of the file.

    Raises:
        RefusedImage: see `read_bytes` and `decode`.
    """
    content = read_bytes(path, offset, size)
    return decode(content), hashlib.sha256(content).hexdigest()


def read_bytes(path: str | os.PathLike[str], offset: int = 0, size: int | None = None) -> bytes:
    """Return the bytes of an image: a whole file, or `size` bytes of it from `offset` on (a tar's member).

    Raises:
        RefusedImage: it is not there, cannot be read, is no regular file, or is too large.
    """
    try:
        with open(path, "rb", opener=_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise RefusedImage("unreadable", "not a regular file")
            if (status.st_size if size is None else size) > MAX_BYTES:
                raise RefusedImage("too-large", f"file of more than {MAX_BYTES >> 20} MiB")

            file.seek(offset)
            return file.read(-1 if size is None else size)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise RefusedImage("unreadable", str(getattr(error, "strerror", error))) from None


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for a writer


def decode_apart(content: bytes, timeout: float) -> npt.NDArray[np.uint8]:
    """Do what `decode` does in a process of its own, which an image may crash or block without any harm.

    Raises:
        RefusedImage: also if that process dies, or takes longer than `timeout` seconds.
    """
    command = [sys.executable, "-m", "oscar_extract.images"]
    try:
        done = subprocess.run(command, input=content, capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RefusedImage("timeout", f"decoding takes longer than {timeout:g} s") from None

    if done.returncode == 0:
        pixels: npt.NDArray[np.uint8] = np.load(io.BytesIO(done.stdout), allow_pickle=False)
        return pixels
    if done.returncode == REFUSED:
        reason, _, message = done.stderr.decode(errors="replace").strip().partition(" ")
        raise RefusedImage(reason, message)

    raise RefusedImage("crash", f"the decoder died with {done.returncode}")


REFUSED = 3  # exit code


def main() -> None:
    """Decode stdin."""
    try:
        pixels = decode(sys.stdin.buffer.read())
    except RefusedImage as refused:
        print(refused.reason, refused, file=sys.stderr)
        sys.exit(REFUSED)
    np.save(sys.stdout.buffer, pixels, allow_pickle=False)


def decode(content: bytes) -> npt.NDArray[np.uint8]:
    """Decode an image file's bytes to upright RGB pixels, uint8 [H, W, 3].

    Only the first frame of an animation is used, and transparent pixels are laid over white.

    Raises:
        RefusedImage: see `read_image`.
    """
    try:
        with Image.open(io.BytesIO(content), formats=OPENED) as image:
            image.load()
            return np.asarray(_upright(_rgb(image), _orientation(image)))
    except UnidentifiedImageError:
        raise RefusedImage("not-an-image", "no image format that is known") from None
    except Image.DecompressionBombError as error:
        raise RefusedImage("bomb", str(error)) from None
    except (
        Exception
    ) as error:  # Pillow's decoders raise whatever a damaged file provokes, struct.error and IndexError too
        reason = "truncated" if "truncated" in str(error) else "damaged"
        raise RefusedImage(reason, f"{type(error).__name__}: {error}") from None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data around pixels that are fine
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB; 16-bit and float samples are scaled to 8 bits, not cut off."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep(np.asarray(image)).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _from_deep(samples: npt.NDArray[np.generic]) -> Image.Image:
    """Scale deep samples to 8 bits.

    Integers are scaled from the smallest of 8, 12 and 16 bits that holds them (cameras and scanners store 12 in 16),
    floats from 0..1, or from 0..255 if there are any beyond 1.
    """
    values = np.nan_to_num(samples.astype(np.float32))
    ranges = (1.0, 255.0) if np.issubdtype(samples.dtype, np.floating) else (255.0, 4095.0, 65535.0)
    full = next((r for r in ranges if values.max(initial=0) <= r), ranges[-1])
    return Image.fromarray(np.clip(values * (255 / full) + 0.5, 0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
