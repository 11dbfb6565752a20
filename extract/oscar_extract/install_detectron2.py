"""Install detectron2 with pip alone: `python -m oscar_extract.install_detectron2`. No compiler is needed.

The package registry has no detectron2 under its own name. It has `detectron2-cdo` 0.5, whose Python sources are those
of the official tag v0.5, file for file; the C++ and CUDA sources are missing, so pip cannot build it. Faster R-CNN
needs none of them: NMS and RoIAlign come from torchvision. This module makes a proper wheel of those sources, mends
what newer numpy, Pillow, setuptools and torch changed since 2021, and installs it.

Only the standard library is used, so that the file also runs by itself, before anything else is installed.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

REQUIREMENT = "detectron2-cdo==0.5"
SDIST_SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"
SDIST_TOP = "detectron2_cdo-0.5/"
OLDEST = (0, 5)

VERSION = "0.5+nocext"
DIST_INFO = f"detectron2-{VERSION}.dist-info"
METADATA = f"""\
Metadata-Version: 2.1
Name: detectron2
Version: {VERSION}
Summary: Detectron2 v0.5 without compiled operators, mended for current numpy, Pillow, setuptools and torch
License: Apache-2.0
Requires-Python: >=3.8
Requires-Dist: torch>=1.10
Requires-Dist: torchvision
Requires-Dist: Pillow>=7.1
Requires-Dist: matplotlib
Requires-Dist: pycocotools>=2.0.2
Requires-Dist: termcolor>=1.1
Requires-Dist: yacs>=0.1.8
Requires-Dist: tabulate
Requires-Dist: cloudpickle
Requires-Dist: tqdm>4.29.0
Requires-Dist: fvcore>=0.1.5,<0.1.6
Requires-Dist: iopath>=0.1.7,<0.2
Requires-Dist: omegaconf>=2.1
Requires-Dist: hydra-core>=1.1
"""
WHEEL = "Wheel-Version: 1.0\nGenerator: oscar_extract.install_detectron2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"

# detectron2's setup.py maps these folders into the package; a wheel has to carry them where they are imported.
PROJECTS = {
    "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
    "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
    "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
}

# (file, text, replacement): each must be found, or the sources are not the ones this was written for.
MENDS = [
    ("detectron2/model_zoo/model_zoo.py", "import pkg_resources\n", ""),  # gone from setuptools
    (
        "detectron2/model_zoo/model_zoo.py",
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
        'os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", config_path)',
    ),
    ("detectron2/data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR"),  # Pillow 10
    ("detectron2/modeling/anchor_generator.py", "(shifts_y, shifts_x)", '(shifts_y, shifts_x, indexing="ij")'),
    # The fast implementation is compiled; without it the default has to be the official one.
    ("detectron2/evaluation/coco_evaluation.py", "use_fast_impl=True", "use_fast_impl=False"),
]
NUMPY_ALIAS = re.compile(r"\bnp\.(bool|int|float|object)\b")  # numpy 1.24 removed these names of Python's own types

NO_COMPILED_OPS = '''\
"""Stands where the compiled operators would be (deformable convolution, rotated boxes, fast COCOeval)."""


def get_compiler_version():
    return "none"


def get_cuda_version():
    return "none"


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise NotImplementedError(f"detectron2._C.{name} is a compiled operator; build detectron2 from source to use it")
'''

# pip asks a source package's build backend for its metadata even when it only downloads. detectron2's setup.py wants
# torch and a compiler's environment for that, and no downloaded code should run before its hash is checked. This
# backend, put in setuptools' place for that one call, answers instead.
BACKEND = """\
from pathlib import Path


class __legacy__:
    @staticmethod
    def prepare_metadata_for_build_wheel(directory, config_settings=None):
        info = Path(directory, "detectron2_cdo-0.5.dist-info")
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: detectron2-cdo\\nVersion: 0.5\\n")
        return info.name
"""


class InstallError(Exception):
    """A failure that one line explains."""


def installed() -> str | None:
    """The version of the detectron2 that this Python imports, "unknown" for bare sources on the path, or None."""
    try:
        return importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return "unknown" if importlib.util.find_spec("detectron2") else None


def is_supported(version: str) -> bool:
    """Whether a detectron2 of this version can be used as it is."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is None or (int(numbers[1]), int(numbers[2])) >= OLDEST


def pip(*arguments: str, env: dict[str, str] | None = None) -> None:
    """Run this Python's pip, so that the index, proxy and certificates are those the user has configured."""
    command = [sys.executable, "-m", "pip", *arguments]
    if subprocess.run(command, env={**os.environ, **(env or {})}).returncode != 0:
        raise InstallError(f"pip {arguments[0]} failed; its own message stands above")


def download(folder: Path) -> Path:
    """Fetch the source archive into `folder`, check its hash and return its path; nothing in it is executed."""
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(BACKEND)
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--use-pep517", "--no-binary=detectron2-cdo"]
    pip("download", *flags, "--dest", str(folder), REQUIREMENT, env={"PYTHONPATH": str(backend.parent)})
    (sdist,) = folder.glob("*.tar.gz")
    sha256 = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if sha256 != SDIST_SHA256:
        raise InstallError(f"{sdist.name} has sha256 {sha256}, expected {SDIST_SHA256}; nothing was installed")

    return sdist


def mend(name: str, source: str) -> str:
    """Replace what newer releases of detectron2's dependencies removed from the module `name`."""
    for path, old, new in MENDS:
        if path == name:
            if old not in source:
                raise InstallError(f"{name} does not contain {old!r}: not the sources of detectron2 0.5")
            source = source.replace(old, new)
    return NUMPY_ALIAS.sub(r"\1", source)


def wheel_members(sdist: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name in the wheel, content) for each file, without the RECORD."""
    with tarfile.open(sdist) as tar:
        for member in tar:
            name = member.name.removeprefix(SDIST_TOP)
            for folder, target in PROJECTS.items():
                if name.startswith(folder):
                    name = target + name.removeprefix(folder)

            stream = tar.extractfile(member) if member.isfile() else None
            if stream is None:
                continue

            if name == "LICENSE":
                yield f"{DIST_INFO}/LICENSE", stream.read()
            elif name.startswith("detectron2/") and name.endswith(".py"):
                yield name, mend(name, stream.read().decode()).encode()
            elif name.startswith("detectron2/"):
                yield name, stream.read()

    yield "detectron2/_C.py", NO_COMPILED_OPS.encode()
    yield f"{DIST_INFO}/METADATA", METADATA.encode()
    yield f"{DIST_INFO}/WHEEL", WHEEL.encode()


def build_wheel(sdist: Path, folder: Path) -> Path:
    """Write the wheel into `folder`; the same archive always gives the same bytes."""
    members = dict(sorted(wheel_members(sdist)))
    record = [f"{name},sha256={_record_hash(content)},{len(content)}" for name, content in members.items()]
    members[f"{DIST_INFO}/RECORD"] = "\n".join([*record, f"{DIST_INFO}/RECORD,,", ""]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"detectron2-{VERSION}-py3-none-any.whl"

    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            entry = zipfile.ZipInfo(name, date_time=(2021, 7, 23, 0, 0, 0))  # v0.5's release day
            entry.external_attr = 0o644 << 16
            wheel.writestr(entry, content, zipfile.ZIP_DEFLATED)

    return path


def _record_hash(content: bytes) -> str:
    """SHA-256 as a wheel's RECORD writes it: urlsafe base64 without padding."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def install(wheel_dir: Path | None) -> None:
    """Make the wheel and install it with its dependencies, or only leave it in `wheel_dir` if that is given."""
    version = None if wheel_dir else installed()
    if version and is_supported(version):
        print(f"detectron2 {version} is already installed; left as it is")
        return
    if version:
        raise InstallError(f"detectron2 {version} is installed, 0.5 or newer is needed: pip uninstall detectron2 first")

    with tempfile.TemporaryDirectory() as temporary:
        print("downloading detectron2 0.5", flush=True)
        wheel = build_wheel(download(Path(temporary)), wheel_dir or Path(temporary))
        if wheel_dir:
            print(f"wrote {wheel}")
            return

        print("installing detectron2 0.5 and what it needs", flush=True)
        pip("install", "--quiet", "--use-pep517", str(wheel))  # some of its dependencies are published as sources


def main() -> None:
    """Parse the command line; exit 0 when a usable detectron2 is there."""
    parser = argparse.ArgumentParser(
        prog="python -m oscar_extract.install_detectron2",
        description="Install detectron2 0.5 from the package registry, without a compiler. "
        "A detectron2 0.5 or newer that is already installed is left as it is.",
        epilog="pip's own settings (PIP_CONSTRAINT, PIP_INDEX_URL, pip.conf) apply.",
    )
    parser.add_argument("--wheel-dir", type=Path, metavar="DIR", help="write the wheel into DIR and install nothing")
    try:
        install(parser.parse_args().wheel_dir)
    except InstallError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
