"""Trackers: the records of a run, a sweep or a sensitivity, told to TensorBoard or to MLflow. Thin: they read records.jsonl, nothing else.

What a record measured becomes a figure under its badge (`measured/metric`, `estimated/effective_macs`), with
`…_low` and `…_high` where it has an interval. What was not tested is left out and a failed trial is marked: neither is
ever a zero. Telling the same folder twice changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paredown.errors import MissingError, RejectedError, ResourceError, UsageError
from paredown.records import Record, whole_file
from paredown.report.page import read_records
from paredown.report.reading import entry, figure, items, mapping, number, text

EVENTS = "events.out.tfevents.0.paredown"
"""The one file of a record. TensorBoard reads what has `tfevents` in its name; its own names hold that of the machine."""
_LONGEST = 500
"""Characters of a value in MLflow, whose oldest servers keep no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """One record, or a trial that failed, as trackers know runs."""

    name: str
    cell: str
    """Digest of what was done: later figures of it take the place of earlier ones in TensorBoard."""
    key: str
    """SHA-256 of what is told: another one is another run in MLflow."""
    about: Mapping[str, str | int | float | bool]
    figures: Mapping[str, tuple[float, str]]
    """Tag to (value, what it is)."""
    curves: Mapping[str, tuple[tuple[int, float], ...]]
    """Tag to (epoch, value) of a training."""
    failed: str = ""
    """Why a trial has no record."""


def to_tensorboard(folder: str | Path, out: str | Path) -> tuple[Path, ...]:
    """Write one event file per record of a run or sweep folder under `out`; returns their paths.

    Cells are told as hyperparameters, figures as scalars at step 0, training losses by epoch. TensorBoard keeps
    float32: exact counts stand in records.jsonl. The same folder again replaces its files. Raises MissingError
    (TensorBoard), RejectedError (no records), ResourceError (cannot write).
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ImportError as error:
        msg = f"--tensorboard must have TensorBoard. Got {error}. pip install 'paredown[tensorboard]'."
        raise MissingError(msg) from error
    told, written, now = _told(folder), [], time.time()
    for one in told:
        path = Path(out) / _safe(one.name, one.cell) / EVENTS
        events = [
            Event(wall_time=now, file_version="brain.Event:2"),
            Event(wall_time=now, summary=hparams_pb(dict(one.about), trial_id=one.cell, start_time_secs=now)),
        ]
        for tag, (value, what) in one.figures.items():
            events.append(Event(wall_time=now, step=0, summary=scalar_pb(tag, value, description=what)))
        for tag, points in one.curves.items():
            events += [Event(wall_time=now, step=step, summary=scalar_pb(tag, value)) for step, value in points]
        with whole_file(path) as temporary, temporary.open("wb") as file:
            writer = RecordWriter(file)
            for event in [*events, Event(wall_time=now, summary=_ending(one, now))]:
                writer.write(event.SerializeToString())
            writer.flush()
        written.append(path)
    return tuple(written)


def _ending(one: _Told, now: float) -> Any:
    """How a run ended, as the page of hyperparameters reads it; TensorBoard's own function for it needs TensorFlow."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    status = api_pb2.STATUS_FAILURE if one.failed else api_pb2.STATUS_SUCCESS
    end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=now)
    told = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end))
    value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=told, tensor=metadata.NULL_TENSOR)
    return Summary(value=[value])


def to_mlflow(folder: str | Path, uri: str) -> tuple[str, ...]:
    """Make one MLflow run per record of a run or sweep folder, at a tracking URI; returns the ids of the new ones.

    The experiment is "paredown: TASK"; cells are parameters, figures metrics at step 0, training losses metrics by
    epoch, versions and digests tags; a failed trial is a run with status FAILED and no metric. A run that is there
    already is left alone. Files stay where they are. Raises MissingError (MLflow), RejectedError (no records),
    UsageError (a URI that MLflow does not take), ResourceError (a server or database that refuses).
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        msg = f"--mlflow must have MLflow. Got {error}. pip install 'paredown[mlflow]'."
        raise MissingError(msg) from error
    told, task = _told(folder), _task(folder)
    try:
        client = MlflowClient(tracking_uri=uri)
        name = f"paredown: {task}"
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else client.create_experiment(name)
        return tuple(made for one in told if (made := _run_of(client, experiment, one, Path(folder).name)))
    except MlflowException as error:
        said = str(error).splitlines()[0][:300]
        if error.error_code == "INVALID_PARAMETER_VALUE" or "tracking backend" in said:
            msg = f"--mlflow must be a tracking URI: sqlite:///FILE.db or http://HOST:PORT. Got {uri!r}: {said}"
            raise UsageError(msg) from error
        msg = f"MLflow must take the records at {uri}. Got {error.error_code}: {said}"
        raise ResourceError(msg) from error


def _run_of(client: Any, experiment: str, one: _Told, folder: str) -> str:
    """The id of a new run, "" where one of the same content is there."""
    from mlflow.entities import Metric, Param, RunTag

    tag = "paredown_key"
    if client.search_runs(
        [experiment], f"tags.`{tag}` = '{one.key}' and attributes.status != 'RUNNING'", max_results=1
    ):
        return ""
    now = int(time.time() * 1000)
    tags = {tag: one.key, "paredown_folder": folder, **({"paredown_failed": one.failed} if one.failed else {})}
    run = client.create_run(experiment, run_name=one.name[:_LONGEST], start_time=now).info.run_id
    metrics = [Metric(name, value, now, 0) for name, (value, _) in one.figures.items()]
    metrics += [Metric(name, value, now, step) for name, points in one.curves.items() for step, value in points]
    for start in range(0, len(metrics), 1000):  # at most so many in one request
        client.log_batch(run, metrics=metrics[start : start + 1000])
    client.log_batch(
        run,
        params=[Param(_name(name), str(value)[:_LONGEST]) for name, value in [*one.about.items()][:100]],
        tags=[RunTag(name, value[:_LONGEST]) for name, value in tags.items()]
        + [
            RunTag(f"paredown_what.{name.replace('/', '.')}", what[:_LONGEST])
            for name, (_, what) in one.figures.items()
        ],
    )
    client.set_terminated(run, "FAILED" if one.failed else "FINISHED")
    return str(run)


# -------------------------------------------------------------------------------------------------------- what is told


def _told(folder: str | Path) -> tuple[_Told, ...]:
    """Every record with a figure, then every failed trial of a sweep."""
    records = read_records(folder)
    found = [_of_record(record) for record in records if record.measured]
    found += [_of_failure(mapping(f)) for record in records for f in items(entry(record, "failed"))]
    if not found:
        msg = f"records must hold a figure to be told. Got {len(records)} records without one in {folder}."
        raise RejectedError(msg)
    return tuple(found)


def _task(folder: str | Path) -> str:
    return text(mapping(read_records(folder)[0].cell).get("task")) or "model"


def _of_record(record: Record) -> _Told:
    cell = mapping(record.cell)
    versions = mapping(mapping(record.environment).get("versions"))
    about = _plain(cell) | _plain({f"version.{name}": value for name, value in versions.items()})
    about |= _plain({"plan_digest": record.plan_digest, "threads": record.environment.get("threads")})
    key = hashlib.sha256(record.to_json().encode()).hexdigest()
    return _Told(
        name=_title(cell), cell=_digest(cell), key=key, about=about, figures=dict(_figures(record)), curves=_curves(record)
    )  # fmt: skip


def _of_failure(failed: Mapping[str, Any]) -> _Told:
    """A trial without a record: it has a reason and no figure."""
    key = hashlib.sha256(json.dumps(failed, sort_keys=True).encode()).hexdigest()
    why = f"{text(failed.get('status'))}: {text(failed.get('reason'), 400)}"
    cell = {name: value for name, value in failed.items() if name not in ("reason", "tail", "name")}
    return _Told(
        name=_title(failed), cell=_digest(failed), key=key, about=_plain(cell), figures={}, curves={}, failed=why
    )  # fmt: skip


def _digest(cell: Mapping[str, Any]) -> str:
    """That of a trial, of a point of a sensitivity, or of a stage of its recipe."""
    given = text(cell.get("digest"))
    if not given and "kind" in cell:
        return hashlib.sha256(json.dumps(dict(cell), sort_keys=True, default=str).encode()).hexdigest()
    return given or hashlib.sha256(f"{cell.get('recipe_digest')} {cell.get('stage')}".encode()).hexdigest()


def _title(cell: Mapping[str, Any]) -> str:
    """The stage of a run; what a trial of a sweep does, or a point of a sensitivity."""
    if "kind" not in cell:
        return text(cell.get("stage")) or "record"
    if "kept" in cell:
        return " ".join(text(cell.get(name)) for name in ("kind", "name", "kept")) + f" of {text(cell.get('of'))}"
    parts = [text(cell.get(name)) for name in ("kind", "method", "schedule", "amount")]
    return " ".join([*(p for p in parts if p and p != "None"), f"seed {text(cell.get('seed'))}"])


def _figures(record: Record) -> Iterator[tuple[str, tuple[float, str]]]:
    for name in record.measured:
        found = figure(record, name)
        if found.value is None:
            continue  # not tested is no number
        tag = f"{found.badge.replace(' ', '-')}/{name}"
        what = ", ".join(p for p in (found.badge, found.unit, found.protocol) if p)
        yield tag, (float(found.value), what)
        for end, value in (("low", number(found.low)), ("high", number(found.high))):
            if value is not None:
                yield f"{tag}_{end}", (float(value), f"{end} end of the interval; {what}")


def _curves(record: Record) -> dict[str, tuple[tuple[int, float], ...]]:
    """Loss and learning rate by epoch; an attempt that was rolled back has no loss."""
    found: dict[str, list[tuple[int, float]]] = {}
    for epoch in map(mapping, items(entry(record, "history"))):
        for name in ("loss", "lr"):
            value, step = number(epoch.get(name)), epoch.get("epoch")
            if value is not None and isinstance(step, int) and epoch.get("loss") is not None:
                found.setdefault(f"training/{name}", []).append((step, float(value)))
    return {tag: tuple(points) for tag, points in found.items()}


def _plain(values: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    return {str(name): value for name, value in values.items() if isinstance(value, str | int | float | bool)}


def _name(name: str) -> str:
    """A name as MLflow takes them."""
    return re.sub(r"[^\w\-./ ]", "_", name)[:250]


def _safe(name: str, digest: str) -> str:
    """A folder name for any title; two records of one title keep their own."""
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-.')[:80] or 'record'}-{digest[:8]}"
