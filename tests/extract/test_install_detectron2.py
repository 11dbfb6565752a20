"""detectron2's installer: checks what it downloads, mends it, and leaves an installed detectron2 alone."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from oscar_extract import install_detectron2
from oscar_extract.install_detectron2 import InstallError, build_wheel, download, install, is_supported, mend

SOURCES = {
    "LICENSE": "Apache License\n",
    "setup.py": "raise SystemExit('never run')\n",
    "detectron2/__init__.py": '__version__ = "0.5"\n',
    "detectron2/data/build.py": "import numpy as np\nZERO = np.zeros(1, dtype=np.int)\nONE = np.int64(1)\n",
    "detectron2/data/transforms/transform.py": "INTERPOLATION = Image.LINEAR\n",
    "projects/DeepLab/deeplab/__init__.py": "",
}


@pytest.fixture
def sdist(tmp_path: Path) -> Path:
    path = tmp_path / "detectron2_cdo-0.5.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, source in SOURCES.items():
            entry = tarfile.TarInfo(f"detectron2_cdo-0.5/{name}")
            entry.size = len(source)
            tar.addfile(entry, io.BytesIO(source.encode()))
    return path


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.4", False), ("0.5", True), ("0.5+nocext", True), ("0.6", True), ("1.0.dev3", True), ("unknown", True)],
)
def test_versions_from_0_5_on_are_supported(version: str, supported: bool) -> None:
    assert is_supported(version) is supported


def test_an_installed_detectron2_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install_detectron2, "installed", lambda: "0.6+cu121")
    monkeypatch.setattr(install_detectron2, "pip", lambda *_, **__: pytest.fail("pip was run"))
    install(None)
    assert capsys.readouterr().out == "detectron2 0.6+cu121 is already installed; left as it is\n"


def test_an_old_detectron2_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_detectron2, "installed", lambda: "0.4")
    with pytest.raises(InstallError, match=r"0\.4 is installed, 0\.5 or newer is needed"):
        install(None)


def test_another_archive_is_refused(monkeypatch: pytest.MonkeyPatch, sdist: Path) -> None:
    monkeypatch.setattr(install_detectron2, "pip", lambda *_, **__: None)
    with pytest.raises(InstallError, match="expected 53c9e79e"):
        download(sdist.parent)


def test_wheel_installs_and_says_what_it_lacks(sdist: Path, tmp_path: Path) -> None:
    wheel = build_wheel(sdist, tmp_path / "wheels")
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True)
    assert (target / "detectron2/projects/deeplab/__init__.py").exists()
    assert (target / "detectron2-0.5+nocext.dist-info/LICENSE").read_text() == SOURCES["LICENSE"]
    statement = "import detectron2._C as c; print(c.has_cuda()); c.nms_rotated"
    done = subprocess.run([sys.executable, "-c", statement], cwd=target, capture_output=True, text=True)
    assert done.stdout == "False\n"
    assert "detectron2._C.nms_rotated is a compiled operator" in done.stderr


def test_wheel_is_reproducible(sdist: Path, tmp_path: Path) -> None:
    first, second = (build_wheel(sdist, tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_sources_are_mended(sdist: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build_wheel(sdist, tmp_path)) as wheel:
        assert wheel.read("detectron2/data/build.py").decode().splitlines()[1:] == [
            "ZERO = np.zeros(1, dtype=int)",
            "ONE = np.int64(1)",
        ]
        assert wheel.read("detectron2/data/transforms/transform.py") == b"INTERPOLATION = Image.BILINEAR\n"


def test_unexpected_sources_are_refused() -> None:
    with pytest.raises(InstallError, match="not the sources"):
        mend("detectron2/data/transforms/transform.py", "nothing to replace")
