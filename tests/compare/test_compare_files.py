"""Files side by side in the real runtimes: one schedule, right answers only, and the slow integer file called so."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("torchao")

import onnx
from onnx import helper, numpy_helper

from paredown.compare import Comparison, compare, files
from paredown.errors import RejectedError, UsageError
from paredown.export import Artifact, export
from paredown.measure import artifact_at
from paredown.pipeline.folder import files_digest
from paredown.program import capture
from paredown.quantize import quantize


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32.onnx and int8.onnx of one network, wide.onnx with many times the work, slow.onnx: integer codes on a detour."""
    path = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8)).eval()
    wide = nn.Sequential(
        nn.Flatten(), nn.Linear(256, 3000), nn.ReLU(), nn.Linear(3000, 3000), nn.Linear(3000, 8)
    ).eval()
    x = torch.randn(32, 1, 16, 16)
    program = capture(net, x[:2])
    export(program, path / "fp32.onnx")
    export(quantize(program, calibrate=[x]), path / "int8.onnx")
    export((wide, x[:2]), path / "wide.onnx")
    _slow(path / "int8.onnx", path / "slow.onnx")
    return path


def _slow(source: Path, target: Path) -> None:
    """The integer file with a large matrix product that adds zero: the same answers, more time."""
    model = onnx.load(source)
    name = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = [f"{o}_first" if o == name else o for o in node.output]
        node.input[:] = [f"{i}_first" if i == name else i for i in node.input]
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.zeros((8, 2000), "f4"), "detour.a"),
            numpy_helper.from_array(np.zeros((2000, 2000), "f4"), "detour.b"),
            numpy_helper.from_array(np.zeros((2000, 8), "f4"), "detour.c"),
        ]
    )
    model.graph.node.extend(
        [
            helper.make_node("MatMul", [f"{name}_first", "detour.a"], ["detour.x"]),
            helper.make_node("MatMul", ["detour.x", "detour.b"], ["detour.y"]),
            helper.make_node("MatMul", ["detour.y", "detour.c"], ["detour.z"]),
            helper.make_node("Add", [f"{name}_first", "detour.z"], [name]),
        ]
    )
    onnx.save(model, target)


@pytest.fixture(scope="module")
def found(folder: Path) -> Comparison:
    names = ("fp32.onnx", "wide.onnx", "slow.onnx")
    return compare(*(folder / n for n in names), samples=torch.randn(3, 1, 16, 16), runs=40, seconds=3.0)


def test_every_file_runs_in_every_runtime_at_hand(found: Comparison) -> None:
    runtimes = {"onnxruntime"} | ({"openvino"} if _has_openvino() else set())
    assert {(t.file, t.runtime) for t in found.timings} == {
        (f, r) for f in ("fp32.onnx", "wide.onnx", "slow.onnx") for r in runtimes
    }
    for t in found.timings:
        assert t.latency_ms.badge == "measured" and 0 < t.latency_ms.low <= t.latency_ms.value <= t.latency_ms.high
        assert t.latency_ms.n == found.timings[0].latency_ms.n  # one schedule
        assert f"in turns with {len(found.timings) - 1} other(s)" in t.latency_ms.protocol
    assert {t.scheme for t in found.timings if t.file == "slow.onnx"} == {"int8"}


def test_the_fastest_is_a_small_file_and_the_ratios_are_to_it(found: Comparison) -> None:
    by_name = {t.name: t for t in found.timings}
    best = by_name[str(found.fastest)]
    assert best.file == "fp32.onnx"  # 0.07 M products against 9.8 M and 4 M
    assert best.slowdown.value == 1.0
    wide = by_name["wide.onnx in ONNX Runtime"]
    assert wide.slowdown.value == pytest.approx(wide.latency_ms.value / best.latency_ms.value)
    assert 3 < wide.slowdown.low <= wide.slowdown.value <= wide.slowdown.high
    assert wide.name not in found.as_fast
    right = [t for t in found.timings if t.answers != "other"]
    assert [t.slowdown.value for t in right] == sorted(t.slowdown.value for t in right)


def test_an_integer_file_that_is_slower_than_float_is_not_recommended(found: Comparison) -> None:
    said = [n for n in found.notes if n.startswith("slow.onnx in ONNX Runtime (int8) is slower than fp32.onnx")]
    assert len(said) == 1 and "Not recommended" in said[0]
    assert "slow.onnx" not in str(found.fastest)


def _has_openvino() -> bool:
    try:
        import openvino  # noqa: F401
    except ImportError:
        return False
    return True


def test_a_runtime_that_answers_otherwise_is_never_the_fastest(folder: Path) -> None:
    """Two entries of one file, of which the second has been given another session: the answers decide."""
    entries = files._opened({"a": artifact_at(folder / "fp32.onnx")}, torch.randn(1, 1, 16, 16), 1, [])
    own = entries[0]
    wrong = dataclasses.replace(
        own, name="a elsewhere", runtime="elsewhere", outputs=tuple(o + 0.1 for o in own.outputs)
    )
    near = dataclasses.replace(own, name="a near", runtime="near", outputs=tuple(o * (1 + 1e-6) for o in own.outputs))
    assert files._answers(own, [own, wrong]) == ("own", "")
    assert files._answers(near, [own, near]) == ("same", "")
    kind, said = files._answers(wrong, [own, wrong])
    assert kind == "other" and "answers otherwise than ONNX Runtime" in said


def test_integer_files_of_this_machine(folder: Path) -> None:
    """INT8 beside FP32: no runtime's sums saturate, so that all answers are of the same network."""
    found = compare(folder / "fp32.onnx", folder / "int8.onnx", runs=10, seconds=1.0)  # noise, seeded
    assert {t.answers for t in found.timings} <= {"own", "same"}
    assert [t.note for t in found.timings] == [""] * len(found.timings)
    assert found.not_tested


class Steep(nn.Module):
    """Layers that multiply small differences: a value that rounds to the other side is many of them behind."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(depth))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.fixture(scope="module")
def steep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, torch.Tensor]:
    """An INT8 file that amplifies rounding, and one sample."""
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    made = quantize(capture(Steep(12), x[:2]), calibrate=[x])
    return export(made, tmp_path_factory.mktemp("steep") / "steep.onnx"), x[:1]


def _moved(artifact: Artifact, sample: torch.Tensor, cosine: float) -> list[files._Entry]:
    """The file in its own runtime and in another, whose answer has that cosine to its own."""
    own = files._opened({"a": artifact}, [sample], 1, [])[0]
    (answer,) = own.outputs
    across = np.roll(answer, 1)
    across -= answer * ((answer * across).sum() / (answer * answer).sum())
    across *= np.linalg.norm(answer) / np.linalg.norm(across)
    turned = (cosine * answer + (1 - cosine**2) ** 0.5 * across).astype("f4")
    return [own, dataclasses.replace(own, name="a elsewhere", runtime="openvino", outputs=(turned,))]


def test_answers_of_a_network_that_amplifies_are_held_to_what_the_file_is_from_itself(
    steep: tuple[Artifact, torch.Tensor],
) -> None:
    entries = _moved(*steep, 0.99)
    kind, said = files._answers(entries[1], entries)
    assert kind == "same" and "amplifies rounding" in said
    entries = _moved(*steep, 0.97)  # below that nothing is excused
    assert files._answers(entries[1], entries)[0] == "other"


def test_answers_of_another_network_are_not_excused(folder: Path) -> None:
    entries = _moved(artifact_at(folder / "int8.onnx"), torch.randn(1, 1, 16, 16), 0.997)
    assert files._answers(entries[1], entries)[0] == "other"


def test_a_network_that_amplifies_has_its_fastest_runtime_and_the_note(steep: tuple[Artifact, torch.Tensor]) -> None:
    pytest.importorskip("openvino")
    artifact, sample = steep
    found = compare(artifact.path, samples=[sample], runs=5, seconds=0.2)
    assert {t.answers for t in found.timings} == {"own", "same"}
    excused = [t for t in found.timings if t.note]  # which values fall on the other side is this processor's
    assert all("amplifies rounding" in t.note and f"{t.name}: {t.note}" in found.notes for t in excused)


def test_without_openvino_the_rest_is_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "openvino", None)
    found = compare(folder / "fp32.onnx", folder / "int8.onnx", runs=5, seconds=0.2)
    assert {t.runtime for t in found.timings} == {"onnxruntime"}
    assert any("fp32.onnx in OpenVINO: not tested" in n and "paredown[openvino]" in n for n in found.notes)


def test_wrong_requests(folder: Path, tmp_path: Path) -> None:
    one = folder / "fp32.onnx"
    with pytest.raises(UsageError, match="two or more folders of runs, or model files"):
        compare()
    with pytest.raises(UsageError, match="two or more folders"):
        compare(one, tmp_path)
    with pytest.raises(UsageError, match="one of them twice"):
        compare(one, one)
    with pytest.raises(UsageError, match="that are there"):
        compare(one, folder / "none.onnx")
    with pytest.raises(UsageError, match="runs ≥ 5"):
        compare(one, runs=1)
    export((nn.Linear(4, 2), torch.zeros(2, 4)), tmp_path / "other.onnx")
    with pytest.raises(RejectedError, match="inputs of one shape"):
        compare(one, tmp_path / "other.onnx")
    with pytest.raises((RejectedError, UsageError), match=r"other\.onnx"):
        compare(one, tmp_path / "other.onnx", samples=torch.randn(1, 1, 16, 16))
    (tmp_path / "broken.onnx").write_bytes(b"\0")
    with pytest.raises(RejectedError):
        compare(one, tmp_path / "broken.onnx")


class Masked(nn.Module):
    """A mask in, minus infinity out where it says so."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.a(x).masked_fill(~mask, float("-inf"))


def test_masks_in_and_minus_infinity_out_are_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(2, 4), torch.tensor([[True, False] * 3] * 2))
    paths = [str(export((Masked().eval(), inputs), tmp_path / name).path) for name in ("a.onnx", "b.onnx")]
    found = compare(
        *paths, runs=5, seconds=0.2
    )  # no samples: of a mask all is false, and every output is minus infinity
    assert {t.answers for t in found.timings} <= {"own", "same"} and len(found.timings) >= 2
    own, infinite = np.array([[1.0, -np.inf]]), np.array([[np.nan, -np.inf]])
    artifact = artifact_at(Path(paths[0]))
    entry = lambda outputs, runtime: files._Entry(  # noqa: E731
        name="a",
        file="a",
        artifact=artifact,
        runtime=runtime,
        session=None,
        feed={},
        outputs=outputs,
    )
    first = entry([own], "onnxruntime")
    for outputs, wanted in ((own, "same"), (infinite, "other"), (-own, "other"), (np.array([[9.0, -np.inf]]), "other")):
        other = entry([outputs], "openvino")
        assert files._answers(other, [first, other])[0] == wanted


def test_weights_beside_the_graph_make_another_file(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    x, seen = torch.randn(2, 4), []
    for name in ("a.xml", "b.xml"):
        torch.manual_seed(len(seen))
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
        seen.append(export((net, x), tmp_path / name, target="openvino-x86"))
    assert seen[0].path.read_bytes() == seen[1].path.read_bytes()
    assert files_digest(seen[0].files) != files_digest(seen[1].files)
    assert files_digest(seen[0].files[:1]) == files_digest(seen[1].files[:1])
