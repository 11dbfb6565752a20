"""Shards to other formats: a writer for each, and images.parquet with what they have no place for."""

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from oscar_common.errors import OperationError, UsageError
from oscar_common.files import TEMPORARY, hold, release, replacing_folder, restore_folder
from oscar_common.progress import Meter, meter, plural
from oscar_common.sample import Sample
from oscar_shards.formats import lxmert_tsv, npz, sidecar
from oscar_shards.formats.fields import Vocabulary
from oscar_shards.formats.oscar_writer import OscarWriter, files_beside
from oscar_shards.manifest import FILE, Manifest, read_manifest, write_manifest
from oscar_shards.read import find_shards, read_rejects, read_samples
from oscar_shards.write import Reject, sample_json


class Writer(Protocol):
    """Writes samples in another format."""

    def add(self, sample: Sample) -> tuple[str, str]:
        """Write a sample and return the file and id that it has there; both are empty if it has none."""

    def close(self) -> list[str]:
        """Write what comes last and return what people should know, a line each."""


def export_shards(format: str, path: Path, out: Path, overwrite: bool) -> None:
    """Write a folder of shards, or one of its tars, in another format.

    Raises:
        UsageError: there are no shards, or something is in `out`.
    """
    manifest, tars = _shards_of(path)
    _check_out(out, path, overwrite)
    total = manifest.plan.num_images

    with _alone(out), replacing_folder(out) as folder, ExitStack() as stack, meter("images", total) as progress:
        writer = _writer(format, folder, manifest, stack)
        beside = sidecar.SidecarWriter(folder, format, tars, stack)
        done = sum(_export_tar(tar, writer, beside, progress) for tar in tars)
        notes = writer.close()
        beside.close()
        write_manifest(folder, manifest)
        if path.is_dir():  # to the byte
            shutil.copyfile(path / FILE, folder / FILE)

    print("".join(f"{note}\n" for note in notes), end="")
    print(f"{out}: {plural(done, 'image')}")


def _shards_of(path: Path) -> tuple[Manifest, list[Path]]:
    """Return what is exported: the shards of a folder, or one, for which the manifest is adapted."""
    if not path.exists():
        raise UsageError(f"PATH {path}: no such file or folder; give a folder of shards, or a tar")

    folder = path if path.is_dir() else path.parent
    if not (folder / FILE).is_file():
        raise UsageError(f"PATH {path}: no {FILE} in {folder}; run: oscar-shards index {folder}")
    if path.is_dir():
        return find_shards(path, "PATH")

    whole = read_manifest(folder, "PATH")
    samples = _samples(path)
    texts, images = 0, 0

    for sample in samples:
        texts, images = texts + len(sample.texts), images + 1

    images += len(_rejects(path))
    sha256 = hashlib.sha256(f"{whole.plan.sha256} {path.name}".encode()).hexdigest()
    plan = dataclasses.replace(
        whole.plan, num_images=images, num_texts=texts, num_shards=1, sha256=sha256, images_per_shard=max(images, 1)
    )
    return dataclasses.replace(whole, plan=plan, name=whole.name if path in whole.tars(folder) else ""), [path]


def _samples(tar: Path) -> Iterator[Sample]:
    try:
        yield from read_samples(tar)
    except ValueError as error:
        raise UsageError(f"PATH {tar}: {error}; see: oscar-shards verify {tar}") from None


def _rejects(tar: Path) -> list[Reject]:
    table = read_rejects([tar])
    return [] if table is None else [Reject(**row) for row in table.to_pylist()]


def _check_out(out: Path, path: Path, overwrite: bool) -> None:
    if out.resolve() == path.resolve() or out.resolve() in path.resolve().parents:
        raise UsageError(f"--out {out}: the shards are in it; give another --out")
    if out.is_file():
        raise UsageError(f"--out {out}: a file; give a folder")

    restore_folder(out)
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UsageError(f"--out {out}: not empty; give another --out, or --overwrite")
        if why := _is_foreign(out):
            raise UsageError(f"--overwrite: {out} is no export ({why}); delete it, or give another --out")


def _is_foreign(out: Path) -> str:
    """Return why a folder is not an export, for a message; an empty string if it is one."""
    try:
        format, data = sidecar.read_files(out / sidecar.FILE)
    except (OSError, ValueError, LookupError, pa.ArrowException):
        return f"no {sidecar.FILE} of one in it"

    names = {FILE, sidecar.FILE, *data, *(files_beside(data) if format == "oscar" else [lxmert_tsv.FILE])}
    folders = {str(parent) for name in names if "/" in name for parent in Path(name).parents}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if name not in (folders if path.is_dir() else names):
            return f"{name} is in it"

    return ""


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Let no other export write to `out` meanwhile."""
    lock = out.with_name(f"{TEMPORARY}{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle = hold(lock)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written: {error.strerror}; give another --out") from None

    if handle is None:
        raise OperationError(f"{out}: another process is writing there; wait for it, or give another --out")

    try:
        yield
    finally:
        release(handle, lock)


def _writer(format: str, folder: Path, manifest: Manifest, stack: ExitStack) -> Writer:
    if format == "oscar":
        return OscarWriter(folder, stack)
    vocabulary = Vocabulary(manifest.detector.classes, manifest.detector.attributes)
    if format == "npz":
        return npz.NpzWriter(folder, vocabulary)
    return lxmert_tsv.TsvWriter(folder, format, vocabulary, stack)


def _export_tar(tar: Path, writer: Writer, beside: sidecar.SidecarWriter, progress: Meter) -> int:
    """Write the samples of a tar and return how many they are."""
    places = []
    for sample in _samples(tar):
        file, id = writer.add(sample)
        places.append((sample.key, sample_json(sample).decode(), file, id))
        progress.show(progress.done + 1, 0)

    rejects = _rejects(tar)
    beside.add(tar, places, rejects)
    progress.show(progress.done + len(rejects), 0)
    return len(places)
