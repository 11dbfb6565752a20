"""Weights that are not on this machine: from the Hugging Face hub or detectron2's model zoo, kept in their caches."""

import importlib.util
import urllib.error
import urllib.request
from pathlib import Path
from typing import NoReturn

from oscar_common.errors import UsageError, reason, shorten

HUB = "hf://"  # hf://OWNER/NAME/FILE
TIMEOUT = 10  # seconds to wait for a server's first answer


def zoo_config(name: str) -> Path | None:
    """Return the config file of a name in detectron2's model zoo, like COCO-Detection/faster_rcnn_R_50_FPN_3x."""
    detectron2 = importlib.util.find_spec("detectron2")
    places = detectron2.submodule_search_locations if detectron2 else None
    path = Path((places or [""])[0], "model_zoo", "configs", f"{name.removesuffix('.yaml')}.yaml")
    return path if path.is_file() else None


def local_file(name: str, weights: str) -> Path:
    """Return the path of a detector's weights: a file, a hub file, or a URL of the model zoo; downloads are kept.

    Raises:
        UsageError: it is not here and cannot be downloaded.
    """
    if weights.startswith(HUB):
        owner, repository, file = weights.removeprefix(HUB).split("/", 2)
        return _from_hub(name, f"{owner}/{repository}", file)
    if "://" in weights:
        return _from_url(name, weights)
    return Path(weights)


def _from_hub(name: str, repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    url = hf_hub_url(repository, file)

    try:
        return Path(hf_hub_download(repository, file, local_files_only=True))
    except LocalEntryNotFoundError:
        _check_reachable(name, url)

    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub's client has a dozen kinds for "no such file", "not allowed" and "cut off"
        _give_up(name, url, error)


def _from_url(name: str, url: str) -> Path:
    from detectron2.utils.file_io import PathManager

    try:
        return Path(PathManager.get_local_path(url))
    except Exception as error:  # urllib, sockets and iopath, each with its own kinds
        _give_up(name, url, error)


def _check_reachable(name: str, url: str) -> None:
    """Say at once that there is no network; the libraries' own downloads try for half a minute."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # a server answers; the download says what it has against us
    except OSError as error:
        _give_up(name, url, error)


def _give_up(name: str, url: str, error: Exception) -> NoReturn:
    cause = getattr(error, "reason", error)  # urllib's, which may be a text
    cause_text = reason(cause) if isinstance(cause, Exception) else shorten(str(cause)) or reason(error)
    raise UsageError(
        f"--detector {name}: its weights are not on this machine and cannot be downloaded ({cause_text}); fetch {url} "
        "where there is a network, and give the file with --weights FILE"
    )
