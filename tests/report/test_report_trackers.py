"""Trackers: what TensorBoard and MLflow read back is what the records say; what is not known is not there."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from curve_records import head, trial
from paredown.cli import main
from paredown.errors import MissingError, RejectedError, UsageError
from paredown.records import Measured, Record
from paredown.report.trackers import EVENTS, to_mlflow, to_tensorboard
from paredown.search.damage import Damage, Hurt, record_of
from paredown.search.probe import Seen

LOSSES = [(1, 0.9), (2, 0.5), (3, 0.25)]


def stage() -> Record:
    """A level with an estimate, a figure that was not tested and a history with an attempt that was rolled back."""
    history = [{"epoch": e, "loss": loss, "lr": 0.1 / e} for e, loss in LOSSES]
    history.insert(1, {"epoch": 2, "loss": None, "lr": 0.2})
    measured = {
        "metric": Measured(value=97.5, unit="%", low=96.0, high=98.25, n=540, protocol="bootstrap over the samples"),
        "parameters": Measured(value=25_557_032, unit=""),
        "effective_macs": Measured(value=1000, unit="MAC", badge="estimated"),
        "latency_ms": Measured(value=None, unit="ms", badge="not tested"),
    }
    cell = {"stage": "level-1", "title": "Pruned", "recipe_digest": "ab" * 32, "task": "digits"}
    environment = {"versions": {"torch": "2.13.0", "torchao": None}, "threads": 2}
    return Record(cell=cell, measured=measured, environment=environment, details={"history": history}, plan_digest="cd")


def sweep() -> list[Record]:
    """Two trials that came through and one that did not."""
    found = [trial("base", None, 0, 98.5, 98.0, steps=100), trial("pruned", 0.5, 0, 97.5, 97.0, steps=50)]
    lost = {
        **found[1].cell,
        "seed": 1,
        "digest": "e" * 64,
        "name": "l1",
        "status": "timeout",
        "reason": "not done in 3 s",
    }
    return [head(cells=3, failed=[{**lost, "tail": ["a line"]}], recipes={}), *found]


def folder(path: Path, records: list[Record]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "records.jsonl").write_text("".join(r.to_json() + "\n" for r in records))
    return path


def told_by_hand(record: Record) -> dict[str, float]:
    """The figures of a record under their badges, written down again."""
    found = {}
    for name, measured in record.measured.items():
        if measured.value is not None:
            found[f"{measured.badge}/{name}"] = float(measured.value)
            if measured.low is not None and measured.high is not None:
                found |= {f"{measured.badge}/{name}_low": measured.low, f"{measured.badge}/{name}_high": measured.high}
    return found


# --------------------------------------------------------------------------------------------------------- TensorBoard


def read_back(path: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar, as TensorBoard's own reader finds them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(path), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    assert not events.Tags()["scalars"]
    tags = [t for t in events.Tags()["tensors"] if not t.startswith("_hparams_")]
    return {t: [(e.step, float(tensor_util.make_ndarray(e.tensor_proto))) for e in events.Tensors(t)] for t in tags}


def told_of(path: Path) -> tuple[dict[str, Any], str]:
    """Hyperparameters and status of a run, as the plugin that shows them finds them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import api_pb2, metadata

    events = EventAccumulator(str(path))
    events.Reload()
    tags = events.summary_metadata
    start = metadata.parse_session_start_info_plugin_data(tags[metadata.SESSION_START_INFO_TAG].plugin_data.content)
    end = metadata.parse_session_end_info_plugin_data(tags[metadata.SESSION_END_INFO_TAG].plugin_data.content)
    values = {n: getattr(v, v.WhichOneof("kind")) for n, v in start.hparams.items()}
    return values, api_pb2.Status.Name(end.status)


def test_tensorboard_reads_back_what_the_records_say(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = folder(tmp_path / "run", [stage()])
    (file,) = to_tensorboard(run, tmp_path / "events")
    found = read_back(file.parent)
    wanted: dict[str, list[tuple[int, float]]] = {t: [(0, v)] for t, v in told_by_hand(stage()).items()}
    wanted |= {"training/loss": LOSSES, "training/lr": [(e, 0.1 / e) for e, _ in LOSSES]}
    assert len(wanted) == 7 and "measured/latency_ms" not in found
    assert found.keys() == wanted.keys()
    for tag, points in wanted.items():
        assert [s for s, _ in found[tag]] == [s for s, _ in points]
        assert [v for _, v in found[tag]] == pytest.approx([v for _, v in points], rel=1e-6)
    about, status = told_of(file.parent)
    assert status == "STATUS_SUCCESS"
    assert about["threads"] == 2 and about["stage"] == "level-1" and about["version.torch"] == "2.13.0"


def test_tensorboard_is_told_nothing_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where machines have names of two letters, the bytes of a time or a checksum hold them now and then."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    monkeypatch.setattr("paredown.report.trackers.time.time", lambda: 2.0**30)
    (file,) = to_tensorboard(folder(tmp_path / "run", [stage()]), tmp_path / "events")
    events = [str(event) for event in EventFileLoader(str(file)).Load()]
    assert len(events) > 10 and any("training/loss" in event for event in events)
    words = {word for event in events for word in re.findall(r"[\w.-]+", event)}
    assert not words & {os.uname().nodename, socket.getfqdn()}
    assert file.name == EVENTS


def test_tensorboard_has_a_run_for_each_trial_and_a_mark_for_a_failed_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = folder(tmp_path / "run", sweep())
    files = to_tensorboard(run, tmp_path / "events")
    assert len({f.parent for f in files}) == 3
    told = [(read_back(f.parent), *told_of(f.parent)) for f in files]
    assert [status for _, _, status in told] == ["STATUS_SUCCESS", "STATUS_SUCCESS", "STATUS_FAILURE"]
    assert told[2][0] == {}  # no figure, above all no zero
    assert told[2][1]["seed"] == 1 and told[1][1]["amount"] == 0.5
    assert told[1][0]["measured/metric"] == [(0, pytest.approx(sweep()[2].measured["metric"].value))]
    before = sorted((tmp_path / "events").rglob("*"))
    again = [*sweep()[:2], trial("pruned", 0.5, 0, 50.0, 50.0, steps=50)]
    to_tensorboard(folder(tmp_path / "run", again), tmp_path / "events")
    assert sorted((tmp_path / "events").rglob("*")) == before
    assert read_back(files[1].parent)["measured/metric"] != told[1][0]["measured/metric"]


def test_tensorboard_has_a_run_for_each_point_of_a_sensitivity(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    damages = [Damage(kind="units", name="conv.weight[0]", kept=kept, of=8) for kept in (6, 4)]
    damages.append(Damage(kind="bits", name="conv.weight", kept=4, of=32))
    seen = [Seen(metric=1.5, distance=0.25), Seen(metric=3.5, distance=0.5), Seen(metric=0.0, distance=0.125)]
    points = [record_of(Hurt(damage=d, seen=s), "key", "%", "nats", 100) for d, s in zip(damages, seen, strict=True)]
    cell = {"stage": "sensitivity", "title": "Sensitivity", "recipe_digest": "ab" * 32, "task": "digits"}
    files = to_tensorboard(folder(tmp_path / "run", [Record(cell=cell), *points]), tmp_path / "events")
    assert len({*files}) == 3
    assert [read_back(f.parent)["measured/distance"] for f in files] == [[(0, s.distance)] for s in seen]
    assert files[0].parent.name.startswith("units-conv.weight-0-6-of-8-")
    assert to_tensorboard(tmp_path / "run", tmp_path / "events") == files


# -------------------------------------------------------------------------------------------------------------- MLflow


@pytest.fixture
def store(tmp_path: Path) -> str:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    return f"sqlite:///{tmp_path / 'tracking.db'}"


def test_mlflow_reads_back_what_the_records_say(tmp_path: Path, store: str) -> None:
    from mlflow import MlflowClient

    run = folder(tmp_path / "run", [stage(), *sweep()])
    made = to_mlflow(run, store)
    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("paredown: digits")
    found = {r.info.run_id: r for r in client.search_runs([experiment.experiment_id])}
    assert set(made) == set(found) and len(made) == 4
    level, _, pruned, failed = (found[name] for name in made)
    assert {k: v for k, v in level.data.metrics.items() if not k.startswith("training/")} == told_by_hand(stage())
    assert level.data.metrics["measured/parameters"] == 25_557_032  # exact: a double
    history = client.get_metric_history(made[0], "training/loss")
    assert [(m.step, m.value) for m in history] == LOSSES
    assert level.data.params["stage"] == "level-1" and level.data.params["version.torch"] == "2.13.0"
    assert "estimated, MAC" in level.data.tags["paredown_what.estimated.effective_macs"]
    assert pruned.data.params["amount"] == "0.5" and pruned.data.metrics == told_by_hand(sweep()[2])
    assert [found[name].info.status for name in made] == ["FINISHED"] * 3 + ["FAILED"]
    assert failed.data.metrics == {} and failed.data.tags["paredown_failed"] == "timeout: not done in 3 s"
    assert str(Path.home()) not in str([r.to_dictionary() for r in found.values()])

    assert to_mlflow(run, store) == ()  # told already
    other = dataclasses.replace(stage(), plan_digest="ef")
    assert len(to_mlflow(folder(tmp_path / "run", [other]), store)) == 1
    assert len(client.search_runs([experiment.experiment_id])) == 5


def test_a_uri_that_is_none_and_records_without_figures_are_refused(tmp_path: Path, store: str) -> None:
    run = folder(tmp_path / "run", [stage()])
    with pytest.raises(UsageError, match=r"--mlflow must be a tracking URI"):
        to_mlflow(run, str(tmp_path / "mlruns"))
    with pytest.raises(UsageError, match=r"--mlflow must be a tracking URI.*'nonsense://x'"):
        to_mlflow(run, "nonsense://x")
    with pytest.raises(RejectedError, match=r"must hold a figure.*Got 1 records"):
        to_mlflow(folder(tmp_path / "empty", [Record(cell={"stage": "verdict"})]), store)


# ---------------------------------------------------------------------------------------------------- the command line


def test_report_tells_both(tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("jinja2")
    run = folder(tmp_path / "run", sweep())
    assert main(["report", str(run), "--tensorboard", str(tmp_path / "events"), "--mlflow", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trials"]["failed"] == 1  # one document on stdout, nothing else
    assert len(list((tmp_path / "events").glob(f"*/{EVENTS}"))) == 3
    assert to_mlflow(run, store) == ()


@pytest.mark.parametrize("option", ["--json", "--quiet", None])
def test_what_mlflow_prints_is_never_part_of_the_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: str | None
) -> None:
    """Of an HTTP server it prints a URL for every run that ends."""
    pytest.importorskip("jinja2")

    def talks(folder: object, uri: str) -> tuple[str, ...]:
        print(f"View run level-1 at: {uri}")
        return ("id",)

    monkeypatch.setattr("paredown.report.trackers.to_mlflow", talks)
    run = folder(tmp_path / "run", [stage()])
    assert main(["report", str(run), "--mlflow", "http://host", *([option] if option else [])]) == 0
    out, err = capsys.readouterr()
    assert "View run" not in out
    if option == "--json":
        assert json.loads(out)["schema"] == 1
    elif option == "--quiet":
        assert out + err == ""
    else:
        assert "View run level-1" in err and "MLflow: 1 new runs at http://host" in out


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    tell = to_tensorboard if name == "tensorboard" else to_mlflow
    with pytest.raises(MissingError, match=rf"--{name} must have .* pip install 'paredown\[{name}\]'"):
        tell(folder(tmp_path / "run", [stage()]), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
