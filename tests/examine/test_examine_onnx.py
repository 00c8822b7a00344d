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


def test_weights_of_integer_products_are_parameters(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    from paredown.export import export
    from paredown.quantize import quantize

    x = torch.randn(8, 64)
    program = capture(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval(), x[:2])
    weights = 64 * 96 + 96 * 32
    for scheme, bytes_each in (("int8-dynamic", 1.0), ("w4", 0.5)):
        artifact = export(quantize(program, scheme=scheme), tmp_path / f"{scheme}.onnx")
        found = examine_onnx(artifact.path)
        assert weights <= found.parameters <= weights + 4 * (96 + 32), (
            scheme
        )  # biases, and factors of a layer's channels
        assert found.parameter_bytes == pytest.approx(weights * bytes_each, abs=16 * (96 + 32))


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


def changed(path: Path, dims: tuple[int, ...] = (4, 4), **told: object) -> Path:
    """The file with another shape, or other words about its side file."""
    model = onnx.load_model(str(path), load_external_data=False)
    tensor = model.graph.initializer[0]
    tensor.dims[:] = dims
    for key, value in told.items():
        tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("dims", "told"),
    [
        ((4, 4), {"offset": -4}),
        ((4, 4), {"offset": 4}),
        ((4, 4), {"length": 2**62}),
        ((4, 4), {"length": 60}),
        ((4, 4), {"offset": "x"}),
        ((2**18, 2**18), {}),
    ],
)
def test_fault_14_side_files_hold_what_tensors_declare(
    dims: tuple[int, ...], told: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "w.bin").write_bytes(b"\0" * 64)
    with pytest.raises(RejectedError, match="inside its side file"):
        examine_onnx(changed(with_side_file(tmp_path, "w.bin"), dims, **told))


def test_fault_14_shapes_without_data_and_below_zero(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"\0" * 64)
    with pytest.raises(RejectedError, match="no negative size"):
        examine_onnx(changed(with_side_file(tmp_path, "w.bin"), (-4, 4)))
    path = with_side_file(tmp_path, "w.bin")
    for data, says in ((b"", "Got 0 for 'w'"), (b"\0" * 60, "Got 60 for 'w'")):
        model = onnx.load_model(str(path), load_external_data=False)
        tensor = model.graph.initializer[0]
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
        tensor.raw_data = data
        (tmp_path / "b.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(RejectedError, match=says):
            examine_onnx(tmp_path / "b.onnx")


def huge_values(folder: Path) -> list[Path]:
    """Small files that ask a runtime for 4 TB: by a declared input, and by a shape in a constant."""
    helper, kind = onnx.helper, onnx.TensorProto
    x, y = (helper.make_tensor_value_info(n, kind.FLOAT, [2**40, 4]) for n in "xy")
    declared = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    x, y = (helper.make_tensor_value_info(n, kind.FLOAT, [1, 4]) for n in "xy")
    shape = helper.make_tensor("s", kind.INT64, [2], [2**20, 2**20])
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["c"]),
        helper.make_node("ReduceSum", ["c"], ["r"]),
        helper.make_node("Add", ["x", "r"], ["y"]),
    ]
    made = helper.make_graph(nodes, "g", [x], [y], [shape])
    paths = []
    for name, graph in (("declared.onnx", declared), ("made.onnx", made)):
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        (folder / name).write_bytes(model.SerializeToString())
        paths.append(folder / name)
    return paths


def test_fault_14_small_files_that_ask_for_terabytes(tmp_path: Path) -> None:
    for path in huge_values(tmp_path):
        with pytest.raises(ResourceError, match="elements"):
            examine_onnx(path)


def test_fault_24_more_than_2_gb_beside_the_file(tmp_path: Path) -> None:
    """3 GiB that take no room on the disk; tensor data is not read."""
    rows = 3 * 2**28
    with (tmp_path / "w.bin").open("wb") as side:
        side.truncate(4 * rows)
    found = examine_onnx(changed(with_side_file(tmp_path, "w.bin"), (4, rows // 4)))
    assert found.files == ("a.onnx", "w.bin")
    assert found.file_bytes == (tmp_path / "a.onnx").stat().st_size + 4 * rows > 2**31
    assert found.parameters == rows and found.parameter_bytes == 4 * rows


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
