"""The folder beside a stage's output, `OUT.jobs`: the scripts, the logs of the jobs, and the record of what was done.

shards.jobs/extract.sh, check.sh     what sbatch was given
shards.jobs/logs/extract-12_0.log    job 12, element 0; a job that queues again goes on in its log
shards.jobs/record.json              settings, versions, job ids, nodes, times, counts
"""

import dataclasses
import getpass
import hashlib
import json
import platform
import re
import socket
import sys
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from oscar_common import __version__
from oscar_common.errors import UsageError
from oscar_common.files import replacing
from oscar_common.settings import Extract, Train
from oscar_submit.request import Request, output

RECORD = "record.json"
NOTE = re.compile(
    r"oscar-submit: (?P<event>began|ended)(?: (?P<code>\d+))? (?P<time>\S+) "
    r"job (?P<job>\S+) node (?P<node>\S+) restarts (?P<restarts>\d+)"
)
PACKAGES = ("torch", "torchvision", "transformers", "numpy", "pyarrow")


@dataclass(frozen=True, kw_only=True)
class JobRun:
    """One time that a job, or an element of an array, ran. A killed one has no end. Times are ISO 8601."""

    log: str
    job: str
    node: str
    restarts: int
    began: str
    ended: str | None
    code: int | None


def jobs_folder(out: Path) -> Path:
    """Return the folder of the jobs that write `out`."""
    return out.with_name(f"{out.name}.jobs")


def log_folder(out: Path) -> Path:
    """Return the folder of their logs."""
    return jobs_folder(out) / "logs"


def fingerprint(settings: Extract | Train) -> str:
    """Return eight hexadecimal digits that stand for a stage's settings and the folder of its output."""
    content = json.dumps([type(settings).__name__, str(output(settings)), dataclasses.asdict(settings)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def job_name(request: Request, step: str, settings: Extract | Train) -> str:
    """Return the name of the job of a step, by which it is known again in the queue."""
    return f"oscar-{request.name}-{step}-{fingerprint(settings)}"


def recorded_name(request: Request, step: str, settings: Extract | Train) -> str:
    """Return the name of the job of a step that was submitted last, with whatever settings; else the one to come."""
    record = read_record(output(settings))
    if "fingerprint" not in record:
        return job_name(request, step, settings)
    return f"oscar-{record['pipeline']}-{step}-{record['fingerprint']}"


def read_record(out: Path) -> dict[str, Any]:
    """Return the record of an output; an empty one if there is none.

    Raises:
        UsageError: it is damaged.
    """
    path = jobs_folder(out) / RECORD
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        content = None

    if not isinstance(content, dict):
        raise UsageError(f"{path}: damaged; remove it, and submit again")

    return content


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write the record of an output."""
    path = jobs_folder(out) / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(record, indent=1).encode() + b"\n")


def add_submission(request: Request, settings: Extract | Train, jobs: dict[str, str]) -> None:
    """Note which jobs were submitted, and with what; the settings of the last submission are those that hold."""
    out = output(settings)
    record = read_record(out)
    same = record.get("fingerprint") == fingerprint(settings)
    submission = {
        "time": now(),
        "host": socket.gethostname(),
        "user": getpass.getuser(),
        "folder": str(Path.cwd()),
        "jobs": jobs,
    }
    write_record(
        out,
        {
            "pipeline": request.name,
            "fingerprint": fingerprint(settings),
            "settings": dataclasses.asdict(settings),
            "cluster": {"name": request.cluster_name, **dataclasses.asdict(request.cluster)},
            "versions": versions(),
            "submissions": [*(record.get("submissions", []) if same else []), submission],
        },
    )


def job_ids(record: dict[str, Any]) -> list[str]:
    """Return the ids of all jobs that a record names, in the order of their submission."""
    return [job for submission in record.get("submissions", []) for job in submission["jobs"].values()]


def versions() -> dict[str, str]:
    """Return the versions of this project and of what its numbers depend on."""
    numbers = {"oscar-pretrain": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            continue

    return numbers


def now() -> str:
    """Return the time with its zone, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def logs_of(out: Path, jobs: list[str]) -> list[Path]:
    """Return the logs that some jobs have written, by name."""
    pattern = re.compile(rf"\w+-({'|'.join(map(re.escape, jobs))})(_\d+)?\.log") if jobs else None
    logs = sorted(log_folder(out).glob("*.log"))
    return [log for log in logs if pattern is not None and pattern.fullmatch(log.name)]


def runs_in(log: Path) -> list[JobRun]:
    """Return when and where a job ran, as its log says."""
    runs: list[JobRun] = []
    for line in log.read_text(errors="replace").splitlines():
        note = NOTE.match(line)
        if note is None:
            continue

        if note["event"] == "began":
            runs.append(
                JobRun(
                    log=log.name,
                    job=note["job"],
                    node=note["node"],
                    restarts=int(note["restarts"]),
                    began=note["time"],
                    ended=None,
                    code=None,
                )
            )
        elif runs and note["code"] is not None:
            runs[-1] = dataclasses.replace(runs[-1], ended=note["time"], code=int(note["code"]))

    return runs


def last_lines(log: Path, count: int = 5) -> list[str]:
    """Return the last lines of a log that say something, without those of oscar-submit itself."""
    text = log.read_text(errors="replace")
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and not NOTE.match(line)]
    return lines[-count:]


def command_line() -> list[str]:
    """Return the command that runs, as it was given."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
