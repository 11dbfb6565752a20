"""Where the numbers of a run can be looked at: TensorBoard and, if it is asked for, Weights & Biases."""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from oscar_common.errors import UsageError, reason
from oscar_common.files import replacing

FOLDERS = ("tensorboard", "wandb")  # of a run folder


class Boards:
    """Shows numbers under their names. run: of wandb, None without it."""

    def __init__(self, tensorboard: SummaryWriter, run: Any) -> None:
        self._tensorboard, self._run = tensorboard, run

    def show(self, values: Mapping[str, float], step: int) -> None:
        """Show the numbers of a step."""
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Have TensorBoard's file written."""
        self._tensorboard.flush()


@contextmanager
def open_boards(out: Path, step: int, project: str | None, config: Mapping[str, Any]) -> Iterator[Boards]:
    """Open the boards of a run that goes on after `step`; points of later steps are forgotten, or stay and are equal.

    Args:
        out: the run folder.
        project: at Weights & Biases; None: there is none.
        config: the settings to show there.

    Raises:
        UsageError: wandb cannot begin.
    """
    opened = nullcontext() if project is None else _open_run(out, project, config)
    with closing(SummaryWriter(out / FOLDERS[0], purge_step=step + 1)) as tensorboard, opened as run:
        yield Boards(tensorboard, run)


@contextmanager
def _open_run(out: Path, project: str, config: Mapping[str, Any]) -> Iterator[Any]:
    """Open the run of W&B; its own context manager would print a traceback of every error."""
    run = _begin(out, project, config)
    try:
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise

    run.finish(exit_code=0)


def _begin(out: Path, project: str, config: Mapping[str, Any]) -> Any:
    import wandb

    try:
        return wandb.init(project=project, dir=str(out), id=_name(out), resume="allow", config=dict(config))
    except Exception as error:  # not logged in, no network, no such project: its exceptions differ between versions
        raise UsageError(
            f"--wandb {project}: cannot begin ({reason(error)}); log in with `wandb login`, or set WANDB_MODE=offline"
        ) from None


def _name(out: Path) -> str:
    """Return under which name Weights & Biases knows the run in this folder, whichever start of it this is."""
    path = out / FOLDERS[1] / "id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            file.write(secrets.token_hex(4).encode())
    return path.read_text()
