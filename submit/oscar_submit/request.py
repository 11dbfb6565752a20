"""From a pipeline's name and the command line to what is asked of a cluster."""

import dataclasses
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from oscar_common.cli import check_paths, resolve
from oscar_common.config import installed_catalog, value
from oscar_common.errors import UsageError, nearest
from oscar_common.settings import AUTO, Catalog, Cluster, Expected, Extract, Pipeline, Train, TrainJob, WorkerJobs

STAGES = ("extract", "train")
START_SECONDS = 300  # that a job may need to begin, and SLURM's warning to come early


@dataclass(frozen=True, kw_only=True)
class Request:
    """A pipeline, and the cluster that is to work through it. A stage that is not asked for is None.

    places: those of the changes that say where the output is, which `status` and `cancel` must be given, too.
    """

    name: str
    catalog: Catalog
    cluster_name: str
    cluster: Cluster
    expected: Expected | None
    extract: Extract | None
    train: Train | None
    places: tuple[str, ...] = ()


def make_request(
    catalog: Catalog, name: str, stage: str = "all", cluster: str | None = None, changes: Iterable[str] = ()
) -> Request:
    """Look up a pipeline and its cluster and lay changes like `train.steps=100` over them.

    Raises:
        UsageError: an unknown name or key, a bad value, or a stage that the pipeline lacks.
    """
    pipeline = _pipeline(catalog, name)
    cluster_name, entry = _cluster(catalog, name, cluster or pipeline.cluster)
    layers = {"extract": dict(pipeline.extract), "train": dict(pipeline.train)}

    changes = tuple(changes)

    for change in changes:
        entry = _change(change, layers, entry)

    stages = [s for s in STAGES if layers[s]] if stage == "all" else [stage]
    for stage_name in stages:
        if not layers[stage_name]:
            raise UsageError(
                f"--stage {stage_name}: pipeline {name!r} has no key {stage_name!r}; add it, or give another --stage"
            )

    extract = resolve(Extract, catalog, layers["extract"], {}) if "extract" in stages else None
    train = resolve(Train, catalog, layers["train"], {}) if "train" in stages else None
    request = Request(
        name=name,
        catalog=catalog,
        cluster_name=cluster_name,
        cluster=entry,
        expected=pipeline.expected,
        extract=extract,
        train=train,
        places=tuple(change for change in changes if change.partition("=")[0].endswith(".out")),
    )
    _check(request)

    return request


def _pipeline(catalog: Catalog, name: str) -> Pipeline:
    if name in catalog.pipelines:
        return catalog.pipelines[name]

    older = ""
    if name in installed_catalog().pipelines:
        older = "; the installed version has one: your file is an older one, so copy the entry, or move the file away"

    raise UsageError(f"NAME: no pipeline {name!r} in pipelines.yaml{nearest(name, catalog.pipelines)}{older}")


def _cluster(catalog: Catalog, pipeline: str, name: str | None) -> tuple[str, Cluster]:
    clusters = installed_catalog().clusters | catalog.clusters
    if name is None:
        raise UsageError(
            f"pipeline {pipeline!r} names no cluster; give --cluster (known: {', '.join(sorted(clusters))})"
        )
    if name not in clusters:
        raise UsageError(f"--cluster: no cluster {name!r}{nearest(name, clusters)}")

    return name, clusters[name]


def _change(change: str, layers: dict[str, dict[str, Any]], cluster: Cluster) -> Cluster:
    """Lay one `key=value` over the layers of the stages, or over the cluster, which is returned."""
    key, equals, text = change.partition("=")
    room, _, rest = key.strip().partition(".")
    if not equals or not rest:
        raise UsageError(f"--set {change}: not of the form extract.KEY=VALUE, train.KEY=VALUE or cluster.KEY=VALUE")

    if room == "extract":
        layers[room][rest] = _typed(Extract, rest, text, change)
    elif room == "train":
        layers[room][rest] = _typed(Train, rest, text, change)
    elif room == "cluster":
        return _changed_cluster(cluster, rest, text, change)
    else:
        raise UsageError(f"--set {change}: unknown key {room!r}{nearest(room, (*STAGES, 'cluster'))}")

    return cluster


def _changed_cluster(cluster: Cluster, key: str, text: str, change: str) -> Cluster:
    stage, _, inner = key.partition(".")
    if stage == "extract" and inner:
        workers = dataclasses.replace(cluster.extract, **{inner: _typed(WorkerJobs, inner, text, change)})
        return dataclasses.replace(cluster, extract=workers)
    if stage == "train" and inner:
        job = dataclasses.replace(cluster.train, **{inner: _typed(TrainJob, inner, text, change)})
        return dataclasses.replace(cluster, train=job)

    return dataclasses.replace(cluster, **{key: _typed(Cluster, key, text, change)})


def _typed(schema: type[Any], name: str, text: str, change: str) -> Any:
    """Return a text of the command line as a value of a field; a text field takes it as it is."""
    fields = {field.name: field for field in dataclasses.fields(schema)}
    if name not in fields:
        raise UsageError(f"--set {change}: unknown key {name!r}{nearest(name, fields)}")

    hint = typing.get_type_hints(schema)[name]
    inner = hint
    if typing.get_origin(hint) is types.UnionType:
        inner = next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
        if text == "null":
            return None

    is_text = inner in (str, list[str])
    return value(hint, text if is_text else _yaml(text, change), f"--set {change}", fields[name])


def _yaml(text: str, change: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"--set {change}: {text!r} is no value in YAML") from None


def _check(request: Request) -> None:
    """Refuse what only the stages together with the cluster show to be wrong."""
    if not re.fullmatch(r"[\w.-]+", request.name):
        raise UsageError(f"NAME {request.name!r}: jobs get its name; allowed are letters, digits, -, _ and .")

    for stage, settings in (("extract", request.extract), ("train", request.train)):
        if settings is None:
            continue

        check_paths(settings)
        if settings.out is None:
            raise UsageError(f"pipelines.{request.name}.{stage}: no key 'out', the folder for its output")
        if settings.overwrite:
            raise UsageError(
                f"{stage}.overwrite: a job that queues again would start over; remove {settings.out} yourself"
            )

    _check_times(request)
    if request.train is not None:
        _check_train(request, request.train)


def _check_times(request: Request) -> None:
    """Refuse time limits in which a job would never get to its work."""
    cluster = request.cluster
    for key, time in (("", cluster.time), ("extract.", cluster.extract.time), ("train.", cluster.train.time)):
        if time is not None and seconds_of(time) < cluster.warning_seconds + START_SECONDS:
            raise UsageError(
                f"clusters.{request.cluster_name}.{key}time {time}: a job would be asked to stop before it starts; "
                f"give at least {START_SECONDS // 60} minutes more than warning_seconds {cluster.warning_seconds}"
            )


def seconds_of(time: str) -> int:
    """Return a time limit in seconds, of any form that sbatch takes."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # D-HH, D-HH:MM, D-HH:MM:SS
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:  # MM, MM:SS
        hours, (minutes, seconds) = 0, [*parts, 0][:2]

    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_train(request: Request, settings: Train) -> None:
    if not settings.shards:
        raise UsageError(f"pipelines.{request.name}.train: no key 'shards'; name the folder that stage 1 writes")
    if settings.warmup_steps >= settings.steps:
        raise UsageError(f"train.warmup_steps {settings.warmup_steps}: must be less than train.steps {settings.steps}")

    job = request.cluster.train
    parts = job.ranks * settings.accumulate
    if settings.batch_size != AUTO and settings.batch_size % parts:
        raise UsageError(
            f"train.batch_size {settings.batch_size}: not a multiple of {job.ranks} ranks ({job.nodes} nodes of "
            f"{job.processes_per_node}, clusters.{request.cluster_name}.train) times accumulate {settings.accumulate}; "
            "give one that is, with --set train.batch_size=N"
        )


def output(settings: Extract | Train) -> Path:
    """Return the folder of a stage's output, as a path that holds in any folder."""
    return Path(settings.out or ".").absolute()
