"""report --json: the schema, the order of the rows, null for what was not measured; no torch behind it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field
from sample_run import record, sample, verdict

from paredown.records import Measured, Record
from paredown.report import report_json


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Metric(_Strict):
    name: str
    unit: str
    value: float | int | None
    low: float | int | None
    high: float | int | None
    n: int | None
    badge: str


class _Latency(_Strict):
    median: float | int | None
    p10: float | int | None
    p90: float | int | None
    runtime: str | None
    threads: int | None
    badge: str


class _Row(_Strict):
    stage: str
    file: str | None
    bytes: int | None
    gzip_bytes: int | None
    parameters: int | None
    macs: int | None
    metric: _Metric
    latency_ms: _Latency
    float_nodes: list[str] | None


class _Verdict(_Strict):
    target_met: bool | None
    recommended: str | None
    not_tested: list[str]


class Document(_Strict):
    version: int = Field(alias="schema")
    verdict: _Verdict
    rows: list[_Row]


def document(records: list[Record]) -> dict[str, Any]:
    found = report_json(records)
    Document.model_validate(found)
    again: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    return found


def test_schema_and_order() -> None:
    found = document(sample())
    assert list(found) == ["schema", "verdict", "rows"] and found["schema"] == 1
    assert [r["stage"] for r in found["rows"]] == ["dense", "level-1", "level-2", "twin-int8", "int8"]
    first, last = found["rows"][0], found["rows"][-1]
    assert last["stage"] == found["verdict"]["recommended"] and last["file"] == "int8.onnx"
    by_stage = {r.cell["stage"]: r for r in sample()}
    for row in (first, last):
        given = by_stage[row["stage"]].measured
        assert row["bytes"] == given["bytes"].value and isinstance(row["bytes"], int)
        assert row["macs"] == given["macs"].value
        assert row["metric"] == {
            "name": "accuracy",
            "unit": "%",
            "value": given["metric"].value,
            "low": given["metric"].low,
            "high": given["metric"].high,
            "n": 540,
            "badge": "measured",
        }
        assert row["latency_ms"]["median"] == given["latency_ms"].value
        assert row["latency_ms"]["threads"] == 1, "those of the measurement, not of the process"
        assert row["latency_ms"]["runtime"] == "onnxruntime 1.23.2"
    assert last["float_nodes"] == ["Softmax: probabilities"]


def test_one_training_is_told_where_something_was_trained() -> None:
    told = "other seeds: everything was trained once"
    assert any(t.startswith(told) for t in document(sample())["verdict"]["not_tested"])
    untrained = [
        dataclasses.replace(r, details={k: v for k, v in r.details.items() if k != "history"}) for r in sample()
    ]
    assert not any(t.startswith(told) for t in document(untrained)["verdict"]["not_tested"])


@pytest.mark.parametrize("best", ["level-2", "dense", "int8"])
def test_first_is_dense_and_last_is_recommended(best: str) -> None:
    found = document([*sample()[:-1], verdict(recommended=best)])
    assert found["rows"][0]["stage"] == "dense" and found["rows"][-1]["stage"] == best
    middle = [r["stage"] for r in found["rows"][1:-1]]
    assert len(middle) == len(set(middle)) and best not in middle


def test_not_measured_is_null() -> None:
    found = document([record("dense", "Dense"), record("int8", "INT8")])
    for row in found["rows"]:
        assert [row[k] for k in ("file", "bytes", "gzip_bytes", "parameters", "macs", "float_nodes")] == [None] * 6
        assert row["metric"]["value"] is None and row["metric"]["badge"] == "not tested"
        assert row["latency_ms"]["median"] is None and row["latency_ms"]["badge"] == "not tested"
    assert found["verdict"] == {
        "target_met": None,
        "recommended": None,
        "not_tested": ["size, metric, latency of dense", "size, metric, latency of int8"],
    }


def test_an_estimate_is_not_given_as_a_measurement() -> None:
    run = sample()
    guess = {
        "bytes": Measured(value=5, unit="B", badge="estimated"),
        "latency_ms": Measured(value=1.5, unit="ms", badge="estimated"),
    }
    run[4] = dataclasses.replace(run[4], measured={**run[4].measured, **guess})
    last = document(run)["rows"][-1]
    assert last["bytes"] is None
    assert last["latency_ms"]["median"] == 1.5 and last["latency_ms"]["badge"] == "estimated"


def test_missing_dense_or_recommended_stays_visible() -> None:
    run = [r for r in sample() if r.cell["stage"] not in ("dense", "int8")]
    found = document(run)
    assert found["rows"][0]["stage"] == "dense" and found["rows"][0]["bytes"] is None
    assert found["rows"][-1]["stage"] == "int8" and found["rows"][-1]["latency_ms"]["badge"] == "not tested"
    assert any("int8" in t for t in found["verdict"]["not_tested"])


def test_a_device_that_ran_need_not_be_the_phone() -> None:
    """`bundle/run_local.sh` makes such a record on the machine of the run."""
    device = record("device-some-cpu-onnxruntime-2", "Some CPU, ONNX Runtime, 2 thread(s)")
    told = report_json([*sample()[:-1], device, sample()[-1]])["verdict"]["not_tested"]
    phone = "latency on the phone: these timings are of this machine"
    assert f"{phone} (measured on: Some CPU, ONNX Runtime, 2 thread(s))" in told
    assert phone in report_json(sample())["verdict"]["not_tested"]


def test_later_record_of_a_stage_counts() -> None:
    run = sample()
    newer = dataclasses.replace(run[1], measured={**run[1].measured, "bytes": Measured(value=77, unit="B")})
    found = document([*run[:-1], newer, run[-1]])
    assert found["rows"][0]["bytes"] == 77
    assert [r["stage"] for r in found["rows"]].count("dense") == 1


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 10**400, "7", True, None], ids=range(6))
def test_no_figure_is_invented(wrong: Any) -> None:
    run = sample()
    bad = {k: dataclasses.replace(v, value=wrong) for k, v in run[4].measured.items()}
    run[4] = dataclasses.replace(run[4], measured=bad)
    last = document(run)["rows"][-1]
    assert last["bytes"] is None and last["metric"]["badge"] == "not tested"


def test_report_loads_neither_torch_nor_a_runtime() -> None:
    code = "import sys, paredown.report; print(sorted({'torch', 'numpy', 'onnx', 'onnxruntime', 'jinja2', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
