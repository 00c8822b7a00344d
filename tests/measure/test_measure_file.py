"""Size, latency, memory and quality of real files in the real runtime."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import deploy_nets

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx

from paredown.errors import RejectedError, ResourceError, UsageError
from paredown.export import Artifact, export, predictor
from paredown.measure import artifact_at, machine, machine_text, measure, sizes
from paredown.measure import latency as latencies
from paredown.measure.turns import timed_in_turns
from paredown.records import Measured


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    large = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 1500), nn.ReLU(), nn.Linear(1500, 1500), nn.ReLU(), nn.Linear(1500, 10)
    )
    return export((large, torch.randn(2, 1, 8, 8)), folder / "large.onnx"), export(
        (deploy_nets.Residual().eval(), torch.randn(2, 1, 8, 8)), folder / "small.onnx"
    )


def test_everything_is_measured_with_unit_spread_and_machine(files: tuple[Artifact, Artifact]) -> None:
    large, small = files
    x = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def evaluate(predict: object) -> dict[str, object]:
        return {"accuracy": (predict(x).argmax(1) == 3) * 100.0, "largest": float(predict(x).max())}  # type: ignore[operator]

    found = measure(small, [x], evaluate=evaluate, baseline=large, runs=30, seconds=2.0, units={"accuracy": "%"})
    assert set(found) == {
        *("bytes", "gzip_bytes", "latency_ms", "baseline_latency_ms", "speedup"),
        *("peak_memory_bytes", "after_import_memory_bytes", "memory_bytes", "accuracy", "largest"),
    }
    assert all(
        isinstance(m, Measured) and m.badge == "measured" and m.machine == machine_text() and m.protocol
        for m in found.values()
    )
    timings = {name for name, m in found.items() if m.timing}
    assert timings == {n for n in found if "latency" in n or "memory" in n or n == "speedup"}
    assert found["bytes"].value == small.path.stat().st_size
    assert (found["accuracy"].unit, found["accuracy"].n) == ("%", 20)
    for name in ("latency_ms", "baseline_latency_ms"):
        assert 0 < found[name].low <= found[name].value <= found[name].high
    assert found["speedup"].value == pytest.approx(found["baseline_latency_ms"].value / found["latency_ms"].value)
    assert found["speedup"].value > 1.5  # 2.3 M multiplications against 0.1 M
    assert found["speedup"].low <= found["speedup"].value <= found["speedup"].high
    assert found["memory_bytes"].value == found["peak_memory_bytes"].value - found["after_import_memory_bytes"].value
    # The process holds the runtime, not this test's torch, which needs more than 200 MB.
    assert 20e6 < found["after_import_memory_bytes"].value < 150e6


def test_memory_grows_with_the_weights(files: tuple[Artifact, Artifact]) -> None:
    x = [torch.randn(1, 1, 8, 8)]
    large, small = (measure(f, x, runs=5, seconds=0.1)["memory_bytes"].value for f in files)
    assert large - small > 0.8 * (files[0].size_bytes - files[1].size_bytes)


def test_sizes_are_stat_and_gzip_of_all_files(tmp_path: Path) -> None:
    parts = (tmp_path / "a", tmp_path / "b")
    parts[0].write_bytes(b"x" * 10_000)
    parts[1].write_bytes(bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)))
    found = sizes(parts)
    assert found["bytes"].value == 15_000
    packer = [zlib.compressobj(9, zlib.DEFLATED, 31) for _ in parts]
    expected = sum(len(p.compress(f.read_bytes()) + p.flush()) for p, f in zip(packer, parts, strict=True))
    assert found["gzip_bytes"].value == expected
    assert found == sizes(parts)


def test_readings_take_turns_and_show_their_spread() -> None:
    order: list[str] = []

    class Session:
        def __init__(self, name: str, pause: float) -> None:
            self.name, self.pause = name, pause

        def run(self, _: object, __: object) -> None:
            import time

            order.append(self.name)
            time.sleep(self.pause)

    sessions = {"this": Session("a", 0.002), "baseline": Session("b", 0.006)}
    found = latencies.latency(sessions, dict.fromkeys(sessions), threads=1, runs=10, seconds=5.0, machine="m")
    timed = order[20:]  # after ten warm-up runs of each
    assert timed[:20] == ["a", "b", "b", "a"] * 5  # where the machine is busy, the series is repeated
    assert 2.0 <= found["this"].value < 4.0
    assert 2.0 < found["ratio"].value < 3.2
    assert found["this"].n == 10


@pytest.mark.parametrize(
    ("scheme", "target", "name"),
    [
        *((s, "onnxruntime-x86", "q.onnx") for s in ("int8", "w4a8", "w4", "int8-dynamic", "w2", "ternary", "binary")),
        ("w4a8", "openvino-x86", "q.xml"),
    ],
)
def test_a_file_says_its_scheme(tmp_path: Path, scheme: str, target: str, name: str) -> None:
    from paredown.program import capture
    from paredown.quantize import quantize

    pytest.importorskip("torchao")
    pytest.importorskip(target.removesuffix("-x86"))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    codes = quantize(
        capture(net, torch.randn(2, 64), train=False), target=target, scheme=scheme, calibrate=[torch.randn(32, 64)]
    )
    made = export(codes, tmp_path / name)
    assert artifact_at(made.path) == made
    assert predictor(made)(torch.zeros(3, 64)).shape == (3, 4)


def test_a_file_that_says_another_scheme_than_there_are_is_read_by_its_ops(
    files: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    model = onnx.load(files[1].path)
    model.metadata_props.add(key="paredown_scheme", value="w0")
    onnx.save(model, tmp_path / "odd.onnx")
    assert artifact_at(tmp_path / "odd.onnx").scheme == "fp32"


def test_a_disturbed_run_says_so() -> None:
    unsteady = latencies.spread([1.0] * 50 + [3.0] * 50, "median", "m")
    assert "unsteady" in unsteady.protocol
    assert "unsteady" not in latencies.spread([1.0, 1.01, 1.02] * 30, "median", "m").protocol


STEADY, LOADED = [1.0, 1.01, 1.02] * 20, [1.0] * 30 + [3.0] * 30


@pytest.mark.parametrize(
    ("series", "value", "said", "unsaid"),
    [
        ([STEADY], 1.01, "median", "series"),
        ([LOADED, STEADY], 1.01, "series 2 of 2: the first was disturbed", "unsteady"),
        ([[2.0] * 20 + [9.0] * 40, LOADED], 2.0, "unsteady: both series were disturbed, this one, 2 of 2", "left out"),
        ([LOADED, [2.0] * 20 + [9.0] * 40], 2.0, "unsteady: both series were disturbed, this one, 1 of 2", "left out"),
    ],
)
@pytest.mark.parametrize("names", [("this",), ("this", "baseline")])
def test_a_disturbed_series_is_repeated_once_and_never_averaged_in(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], series: list, value: float, said: str, unsaid: str
) -> None:
    waiting = iter(series)

    def readings(sessions: dict, feeds: dict, **_: object) -> tuple[dict, dict]:
        taken = next(waiting)
        return {name: taken if name == names[-1] else STEADY for name in sessions}, dict.fromkeys(sessions, 1)

    monkeypatch.setattr(latencies, "readings", readings)
    found = latencies.latency(
        dict.fromkeys(names, object()), dict.fromkeys(names), threads=1, runs=60, seconds=1.0, machine="m"
    )
    assert next(waiting, None) is None, "every series was taken, and no more"
    assert found[names[-1]].value == value and found[names[-1]].n == 60
    for name in names:
        assert said in found[name].protocol and unsaid not in found[name].protocol


SLOWED = {"this": [1.5, 1.51, 1.52] * 20, "baseline": [2.4, 2.41, 2.42] * 20}
"""Steady, on a machine with other load: the baseline takes a fifth longer, the file by half."""
FREE = {"this": STEADY, "baseline": [2.0, 2.01, 2.02] * 20}


@pytest.mark.parametrize(
    ("series", "known", "value", "said"),
    [
        ([SLOWED], None, 1.51, "median"),
        ([SLOWED, FREE], 2.0, 1.01, "series 2 of 2: the first was disturbed"),
        ([FREE], 1.9, 1.01, "median"),
        (
            [SLOWED, FREE],
            1.0,
            1.01,
            "this one, 2 of 2, was slowed by other load: the baseline took 2.01 × its least time",
        ),
        (
            [FREE, SLOWED],
            1.0,
            1.01,
            "this one, 1 of 2, was slowed by other load: the baseline took 2.01 × its least time",
        ),
    ],
)
def test_a_series_that_other_load_slows_throughout_is_seen_by_the_baseline(
    monkeypatch: pytest.MonkeyPatch, series: list, known: float | None, value: float, said: str
) -> None:
    waiting = iter(series)
    monkeypatch.setattr(latencies, "readings", lambda *_, **__: (next(waiting), {"this": 1, "baseline": 1}))
    found = latencies.latency(
        {"this": object(), "baseline": object()}, {}, threads=1, runs=60, seconds=1.0, machine="m", baseline_ms=known
    )
    assert next(waiting, None) is None
    assert found["this"].value == value and said in found["this"].protocol


def test_the_memory_module_runs_by_itself(files: tuple[Artifact, Artifact]) -> None:
    command = [sys.executable, "-m", "paredown.measure.memory", str(files[1].path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["peak_bytes"] >= found["after_import_bytes"] > 10e6


class Four(nn.Module):
    """Of four samples, always."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(4, 64) @ torch.ones(64, 2)


def test_a_fixed_batch_is_said_and_not_compared_with_one_sample(
    files: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    four = export((Four(), torch.randn(4, 1, 8, 8)), tmp_path / "four.onnx")
    x = [torch.randn(4, 1, 8, 8)]
    with pytest.raises(RejectedError, match=r"inputs of one shape.*\[4, 1, 8, 8\].*four\.onnx.*\[1, 1, 8, 8\].*batch"):
        measure(four, x, baseline=files[1], runs=5, seconds=0.1, memory=False)
    with pytest.raises(RejectedError, match="inputs of one shape"):
        timed_in_turns({"a": four, "b": files[1]}, x, runs=5, seconds=0.1)
    found = measure(four, x, baseline=four, runs=5, seconds=0.1)
    for name in ("latency_ms", "baseline_latency_ms", "memory_bytes"):
        assert "a batch of 4" in found[name].protocol
    assert "batch" not in measure(files[1], x, runs=5, seconds=0.1, memory=False)["latency_ms"].protocol


def test_the_scheme_of_a_file_is_that_of_its_matrices(tmp_path: Path) -> None:
    helper, kind = onnx.helper, onnx.TensorProto
    x, y = (helper.make_tensor_value_info(n, kind.FLOAT, ["n", 4]) for n in "xy")
    product = helper.make_node("MatMul", ["x", "m"], ["y"])
    cast = [helper.make_node("Cast", ["w"], ["m"], to=kind.FLOAT), product]
    scaled = [helper.make_node("DequantizeLinear", ["w", "s"], ["m"]), product]
    both = [helper.make_node("QuantizeLinear", ["x", "s"], ["q"]), *scaled]
    for expected, nodes, of in (
        ("fp32", cast, kind.FLOAT),
        ("fp16", cast, kind.FLOAT16),
        ("int8", scaled, kind.INT8),
        ("w4", scaled, kind.INT4),
        ("w4a8", both, kind.INT4),
    ):
        held = [helper.make_tensor("w", of, [4, 4], [1] * 16), helper.make_tensor("s", kind.FLOAT, [], [1.0])]
        model = helper.make_model(
            helper.make_graph(nodes, "g", [x], [y], held), opset_imports=[helper.make_opsetid("", 21)]
        )
        onnx.save(model, tmp_path / "a.onnx")
        assert artifact_at(tmp_path / "a.onnx").scheme == expected


@pytest.mark.parametrize("scheme", ["fp32", "fp16"])
def test_the_scheme_of_an_openvino_file(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    net = (deploy_nets.Residual().eval(), torch.randn(2, 1, 8, 8))
    artifact = export(net, tmp_path / "net.xml", target="openvino-x86", scheme=scheme)
    assert artifact_at(artifact.path) == artifact


def test_wrong_requests(files: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    x = [torch.randn(1, 1, 8, 8)]
    with pytest.raises(RejectedError, match="at least one sample"):
        measure(files[1], [])
    with pytest.raises(UsageError, match="threads must be"):
        measure(files[1], x, threads=0)
    for seconds in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="seconds must be a number above 0"):
            measure(files[1], x, seconds=seconds)
    with pytest.raises(RejectedError, match="measured already"):
        measure(files[1], x, evaluate=lambda _: {"bytes": 1.0}, runs=5, seconds=0.1, memory=False)
    with pytest.raises(RejectedError, match=r"samples must be what the file takes.*\(any, 1, 8, 8\).*\(1, 3, 8, 8\)"):
        measure(files[1], [torch.randn(1, 3, 8, 8)])
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\0")
    with pytest.raises((RejectedError, ResourceError)):
        measure(Artifact(files=(broken,), target="onnxruntime-x86", scheme="fp32"), x)


def test_the_machine_is_described_without_names() -> None:
    import getpass
    import re
    import socket

    facts = machine()
    assert facts["cores"] >= 1
    assert facts["memory_bytes"] is None or facts["memory_bytes"] > 1e8
    assert socket.gethostname() not in re.findall(r"[\w.-]+", machine_text())  # a machine may be called "vm"
    assert getpass.getuser() == "root" or getpass.getuser() not in machine_text()


def test_importing_the_room_loads_neither_torch_nor_a_runtime() -> None:
    code = "import sys, paredown.measure; print([m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
