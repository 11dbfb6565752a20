"""The scripts that sbatch is setting_value, made from templates that read like scripts."""

import dataclasses
import re
import shlex
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from oscar_common.settings import Cluster, Extract, Train
from oscar_submit.folder import job_name, log_folder
from oscar_submit.request import Request, output

WRAP = " \\\n    "  # between the parts of a command that takes several lines
CHECK_TIME, CHECK_CPUS, CHECK_MEMORY = "2:00:00", 2, "4G"


def extract_script(request: Request, settings: Extract, workers: int) -> str:
    """Return the script of the array of workers."""
    cluster, jobs = request.cluster, request.cluster.extract
    throttle = f"%{jobs.max_running}" if jobs.max_running else ""
    directives = _directives(
        request,
        settings,
        "extract",
        log="extract-%A_%a.log",
        time=jobs.time or cluster.time,
        partition=jobs.partition or cluster.partition,
        resources=[
            f"--array=0-{workers - 1}{throttle}",
            "--ntasks=1",
            f"--cpus-per-task={jobs.cpus}",
            f"--mem={jobs.memory}",
            *([f"--gres=gpu:{jobs.gpus}"] if jobs.gpus else []),
        ],
    )
    command = [*python(cluster), "-m", "oscar_extract", "--resume", str(output(settings)), "--workers", "1"]

    return _filled("extract.sh", cluster, directives=directives, command=shlex.join(command))


def check_script(request: Request, settings: Extract) -> str:
    """Return the script of the short job that counts what the workers have written."""
    cluster = request.cluster
    directives = _directives(
        request,
        settings,
        "check",
        log="check-%j.log",
        time=CHECK_TIME,
        partition=cluster.extract.partition or cluster.partition,
        resources=["--ntasks=1", f"--cpus-per-task={CHECK_CPUS}", f"--mem={CHECK_MEMORY}"],
    )
    command = [*python(cluster), "-m", "oscar_submit.finish", "extract", str(output(settings))]
    return _filled("check.sh", cluster, directives=directives, command=shlex.join(command))


def train_script(request: Request, settings: Train) -> str:
    """Return the script that starts torchrun on each node."""
    cluster, job = request.cluster, request.cluster.train
    directives = _directives(
        request,
        settings,
        "train",
        log="train-%j.log",
        time=job.time or cluster.time,
        partition=job.partition or cluster.partition,
        resources=[
            f"--nodes={job.nodes}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={job.cpus}",
            f"--mem={job.memory}",
            *([f"--gres=gpu:{job.gpus}"] if job.gpus else []),
        ],
    )
    torchrun = [*python(cluster), "-m", "torch.distributed.run"]
    torchrun += ["--nnodes", str(job.nodes), "--nproc-per-node", str(job.processes_per_node)]
    step = [f"--nodes={job.nodes}", f"--ntasks={job.nodes}", f"--cpus-per-task={job.cpus}"]
    record = [*python(cluster), "-m", "oscar_submit.finish", "train", str(output(settings))]

    return _filled(
        "train.sh",
        cluster,
        directives=directives,
        torchrun=shlex.join(torchrun),
        command=WRAP.join(["-m oscar_train", *flags(settings)]),
        step=shlex.join(step),
        record=shlex.join(record),
    )


def python(cluster: Cluster) -> list[str]:
    """Return the command that starts Python on the nodes."""
    return shlex.split(cluster.python) if cluster.python else [sys.executable]


def flags(settings: Extract | Train) -> list[str]:
    """Return the flags, quoted for a shell, of all settings that differ from their defaults."""
    quoted = []
    for field in dataclasses.fields(settings):
        setting_value = getattr(settings, field.name)
        if field.name == "recipe" or setting_value is None or setting_value == _default(field):
            continue
        quoted += [shlex.join(part) for part in _flag(field, setting_value)]

    return quoted


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _flag(field: "dataclasses.Field[Any]", setting_value: Any) -> list[list[str]]:
    """Return a setting as it is setting_value on a command line: a flag, or one for each item of a list."""
    name = f"--{field.name.replace('_', '-')}"
    if isinstance(setting_value, bool):
        return [[name if setting_value else f"--no-{name[2:]}"]]
    if isinstance(setting_value, list):
        return [[name, str(item)] for item in setting_value]

    words = {number: word for word, number in field.metadata["words"].items()}
    return [[name, str(words.get(setting_value, setting_value))]]


def _directives(
    request: Request,
    settings: Extract | Train,
    step: str,
    log: str,
    time: str,
    partition: str | None,
    resources: list[str],
) -> str:
    """Return the #SBATCH lines of a script; the options of the user come last and win."""
    cluster = request.cluster
    options = [
        f"--job-name={job_name(request, step, settings)}",
        *([f"--partition={partition}"] if partition else []),
        *([f"--account={cluster.account}"] if cluster.account else []),
        *resources,
        f"--time={time}",
        f"--signal=B:USR1@{cluster.warning_seconds}",
        "--requeue",
        f"--output={log_folder(output(settings)) / log}",
        "--open-mode=append",
        *cluster.options,
    ]
    return "\n".join(f"#SBATCH {option}" for option in options)


def _filled(name: str, cluster: Cluster, **values: str) -> str:
    """Return a template with its values in place; the part that all scripts share is one of them."""
    begin = _fill(_template("begin.sh"), {"folder": shlex.quote(str(Path.cwd())), "setup": _setup(cluster)})
    return _fill(_template(name), {**values, "begin": begin})


def _setup(cluster: Cluster) -> str:
    return "".join(f"{line}\n" for line in cluster.setup)


def _template(name: str) -> str:
    return resources.files("oscar_submit").joinpath("templates", name).read_text(encoding="utf-8")


def _fill(template: str, values: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)
