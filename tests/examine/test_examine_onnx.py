"""ONNX files: figures agree with the exported graph's, side files are counted and may not lead outside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from paredown.errors import RejectedError, ResourceError
from paredown.examine import examine, examine_onnx
from paredown.program import capture

onnx = pytest.importorskip("onnx")


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, groups=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(8 * 16, 5)
    )


def test_an_exported_file_costs_what_the_program_costs(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    program = capture(small(), torch.zeros(2, 3, 8, 8), train=False)
    path = tmp_path / "a.onnx"
    torch.onnx.export(program.eval_graph, program.inputs[0], str(path), dynamo=True, external_data=True, verbose=False)
    cost, found = examine(program), examine_onnx(path)
    assert (found.macs, found.parameters) == (cost.macs, cost.parameters)
    assert found.parameter_bytes == cost.parameter_bytes
    assert found.file_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert len(found.files) == len(list(tmp_path.iterdir()))
    assert found.uncounted == ()
    assert found.ops["Conv"] == 2


def with_side_file(folder: Path, location: str) -> Path:
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [4, 4], b"\0" * 64, raw=True)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", 4]) for n in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [tensor])
    path = folder / "a.onnx"
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return path


def test_a_side_file_is_counted(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"\0" * 64)
    found = examine_onnx(with_side_file(tmp_path, "w.bin"))
    assert found.file_bytes == (tmp_path / "a.onnx").stat().st_size + 64
    assert (found.macs, found.parameters) == (16, 16)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", ""])
def test_a_side_file_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_text("s")
    with pytest.raises(RejectedError, match="side files"):
        examine_onnx(with_side_file(folder, location))


def test_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"\0" * 64)
    (tmp_path / "w.bin").symlink_to(tmp_path / "real")
    with pytest.raises(RejectedError, match="link"):
        examine_onnx(with_side_file(tmp_path, "w.bin"))
    (tmp_path / "w.bin").unlink()
    (tmp_path / "w.bin").hardlink_to(tmp_path / "real")
    with pytest.raises(RejectedError, match="link"):
        examine_onnx(with_side_file(tmp_path, "w.bin"))


def test_huge_declared_sizes_stop_before_memory_does(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"\0" * 64)
    path = with_side_file(tmp_path, "w.bin")
    model = onnx.load_model(str(path), load_external_data=False)
    model.graph.initializer[0].dims[:] = [2**40, 2**20]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ResourceError, match="elements"):
        examine_onnx(path)


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\xde\xad\xbe\xef" * 9)
    with pytest.raises(RejectedError):
        examine_onnx(tmp_path / "a.onnx")
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Secret", ["x"], ["y"], domain="acme")], "g", [x], [y])
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("acme", 1), onnx.helper.make_opsetid("", 18)]
    )
    (tmp_path / "b.onnx").write_bytes(model.SerializeToString())
    assert examine_onnx(tmp_path / "b.onnx").uncounted == ("acme::Secret",)


def test_fault_15_a_circle_and_foreign_ops_are_listed_not_run(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Add", ["b", "x"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Magic", ["b"], ["y"], domain="acme"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3]) for n in ("x", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:]),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("acme", 1)],
    )
    path = tmp_path / "circle.onnx"
    onnx.save(model, path)
    found = examine_onnx(path)
    assert found.ops == {"Add": 1, "Relu": 1, "acme::Magic": 1}
    assert found.uncounted == ("acme::Magic",)
