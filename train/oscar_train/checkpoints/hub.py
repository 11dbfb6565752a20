"""Models of the Hugging Face hub: from its cache on this machine, else from the network, which is asked once."""

from pathlib import Path
from typing import NoReturn

from oscar_common.errors import UsageError, reason
from oscar_train.arguments import ALLOWED_INIT

TIMEOUT = 4.0  # seconds to wait for the hub's first answer; its own downloads try for half a minute
CONFIG = "config.json"


def check(init: str) -> None:
    """Refuse a name that is neither in the cache nor known to the hub.

    Raises:
        UsageError: in one line, within seconds.
    """
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(init, CONFIG), str) and (fault := _fault(init)):
        _give_up(init, fault)


def fetch(init: str, weights: tuple[str, ...], files: tuple[str, ...]) -> Path:
    """Return the folder of a model in the hub's cache, to which it is fetched unless the hub cannot be reached.

    Args:
        init: its name.
        weights: names of files, of which the first that the model has is taken.
        files: names of files that are taken if the model has them.

    Raises:
        UsageError: it is not to be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # type: ignore[no-untyped-call]  # its warnings about retries would come before our one line
    fault = _fault(init)

    def present(name: str) -> bool:
        try:
            return bool(hf_hub_download(init, name, local_files_only=bool(fault)))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return False

    try:
        config = Path(hf_hub_download(init, CONFIG, local_files_only=bool(fault)))
        _ = any(present(name) for name in weights)
        _ = [present(name) for name in files]
    except Exception as error:  # no network, no such model, no rights: each has its own exceptions
        _give_up(init, fault or reason(error))

    return config.parent


def _fault(init: str) -> str:
    """Ask the hub for a model, once; return why it is not to be had, or nothing."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(init, CONFIG), timeout=TIMEOUT)
    except Exception as error:  # each of a dozen kinds, of three libraries
        return reason(error)

    return ""


def _give_up(init: str, fault: str) -> NoReturn:
    raise UsageError(
        f"--init {init}: no such folder, and not to be had from the Hugging Face hub ({fault}); {ALLOWED_INIT}"
    ) from None
