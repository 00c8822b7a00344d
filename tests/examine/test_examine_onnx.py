"""ONNX files: figures agree with the exported graph's, side files are counted and may not lead outside."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
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
    for scheme, bytes_each, others in (("int8-dynamic", 1.0, 96 + 32), ("w4", 0.5, 96 + 32)):
        artifact = export(quantize(program, scheme=scheme), tmp_path / f"{scheme}.onnx")
        found = examine_onnx(artifact.path)
        assert found.parameters == weights + others, scheme  # biases, but no scales
        assert found.parameter_bytes == pytest.approx(weights * bytes_each, abs=16 * (96 + 32))


class Frames(nn.Module):
    """A clip's frames through one convolution, as one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.flatten(0, 1)).unflatten(0, (-1, 5))


class Windows(nn.Module):
    """Attention inside windows of an image, as Swin does it, with the heads folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        windows = x.unflatten(1, (2, 4)).unflatten(3, (2, 4)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        q, k, v = (
            t.flatten(0, 1).unflatten(-1, (2, 3)).transpose(1, 2).flatten(0, 1) for t in self.qkv(windows).chunk(3, -1)
        )
        return self.out(
            (torch.bmm(q, k.transpose(1, 2)).softmax(-1) @ v).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)
        )


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (Frames(), torch.zeros(2, 5, 3, 8, 8)),
        (Windows(), torch.zeros(2, 8, 8, 6)),
        (nn.LSTM(4, 7, num_layers=2, batch_first=True, bidirectional=True), torch.zeros(2, 5, 4)),
        (nn.GRU(4, 7), torch.zeros(5, 2, 4)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_batch_that_is_folded_and_recurrent_nets_cost_what_the_program_costs(
    net: nn.Module, x: torch.Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    from paredown.export import export

    program = capture(net.eval(), x, train=False)
    found = examine_onnx(export(program, tmp_path / "a.onnx").path)
    assert (found.macs, found.uncounted) == (examine(program).macs, ())


def of_nodes(
    folder: Path, nodes: list[Any], inputs: dict[str, list[Any]], weights: dict[str, Any] | None = None, opset: int = 18
) -> Path:
    """A file of these nodes, whose last output is the graph's."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(n, kind, shape) for n, shape in inputs.items()]
    out = helper.make_tensor_value_info(nodes[-1].output[0], kind, None)
    held = [onnx.numpy_helper.from_array(v, n) for n, v in (weights or {}).items()]
    sets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", ends, [out], held), opset_imports=sets)
    path = folder / "nodes.onnx"
    onnx.save(model, path)
    return path


def test_an_axis_of_unknown_length_is_not_one(tmp_path: Path) -> None:
    node = onnx.helper.make_node
    nodes = [
        node("NonZero", ["x"], ["where"]),
        node("Cast", ["where"], ["float"], to=1),
        node("Transpose", ["float"], ["rows"], perm=[1, 0]),
        node("Gemm", ["rows", "w"], ["y"], name="fc"),
    ]
    found = examine_onnx(of_nodes(tmp_path, nodes, {"x": ["n", 4]}, {"w": np.zeros((2, 3), np.float32)}))
    assert (found.macs, found.uncounted) == (0, ("fc",))


@pytest.mark.parametrize("noted", [[8, 4], ["n", 4], ["2*n", 4]])
def test_shapes_noted_in_a_file_fill_only_what_inference_does_not_reach(noted: list[Any], tmp_path: Path) -> None:
    node = onnx.helper.make_node
    made = {"acme": node("Magic", ["x"], ["v"], domain="acme"), "onnx": node("Relu", ["x"], ["v"])}
    for domain, first in made.items():
        nodes = [first, node("Gemm", ["v", "w"], ["y"], name="fc")]
        path = of_nodes(tmp_path, nodes, {"x": ["n", 4]}, {"w": np.zeros((4, 3), np.float32)})
        model = onnx.load(path)
        model.opset_import.append(onnx.helper.make_opsetid("acme", 1))
        model.graph.value_info.append(onnx.helper.make_tensor_value_info("v", 1, noted))
        onnx.save(model, path)
        found = examine_onnx(path)
        if domain == "onnx":
            assert (found.macs, found.uncounted) == (12, ())
        elif noted == ["2*n", 4]:
            assert (found.macs, found.uncounted) == (0, ("acme::Magic", "fc"))
        else:
            assert (found.macs, found.uncounted) == (12 * (8 if noted[0] == 8 else 1), ("acme::Magic",))


@pytest.mark.parametrize(
    ("op", "shapes", "attributes", "macs"),
    [
        ("Einsum", [["n", 3, 4], ["n", 4, 5]], {"equation": "bij,bjk->bik"}, 3 * 4 * 5),
        ("Attention", [["n", 2, 7, 4], ["n", 2, 9, 4], ["n", 2, 9, 3]], {}, 2 * 7 * 9 * (4 + 3)),
        (
            "Attention",
            [["n", 7, 8], ["n", 9, 4], ["n", 9, 3]],
            {"q_num_heads": 2, "kv_num_heads": 1},
            2 * 7 * 9 * (4 + 3),
        ),
        ("RNN", [[5, "n", 4], [1, 6, 4], [1, 6, 6]], {"hidden_size": 6}, 5 * (6 * 4 + 6 * 6)),
        ("DeformConv", [["n", 4, 9, 9], [6, 4, 3, 3], ["n", 18, 7, 7]], {}, 49 * 6 * 4 * 9),
        ("DFT", [["n", 8, 1]], {}, None),
    ],
)
def test_other_ops_that_multiply_are_counted_or_listed(
    op: str, shapes: list[list[Any]], attributes: dict[str, Any], macs: int | None, tmp_path: Path
) -> None:
    inputs = dict(zip("abc", shapes, strict=False))
    node = onnx.helper.make_node(op, list(inputs), ["y"], name="it", **attributes)
    found = examine_onnx(of_nodes(tmp_path, [node], inputs, opset=23))
    assert (found.macs, found.uncounted) == ((0, ("it",)) if macs is None else (macs, ()))


def test_products_inside_a_branch_are_said_to_count_once(tmp_path: Path) -> None:
    helper, kind = onnx.helper, onnx.TensorProto
    y = helper.make_tensor_value_info("z", kind.FLOAT, None)
    branch = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["z"])], "b", [], [y])
    nodes = [
        helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("t", kind.BOOL, [], [True])),
        helper.make_node("If", ["yes"], ["y"], name="choice", then_branch=branch, else_branch=branch),
    ]
    found = examine_onnx(of_nodes(tmp_path, nodes, {"x": ["n", 4]}, {"w": np.zeros((4, 3), np.float32)}))
    assert found.macs == 2 * 12
    assert found.uncounted == ("choice",)


def test_weights_of_dynamic_lstm_and_gemm_codes_are_parameters(tmp_path: Path) -> None:
    lstm = [*("x", "w", "r", "", "", "", "", ""), *("ws", "wz", "rs", "rz")]
    codes = {"w": np.zeros((1, 4, 24), np.uint8), "r": np.zeros((1, 6, 24), np.uint8)}
    for name in ("w", "r"):
        codes |= {f"{name}s": np.ones((1, 24), np.float32), f"{name}z": np.zeros((1, 24), np.uint8)}
    node = onnx.helper.make_node("DynamicQuantizeLSTM", lstm, ["y"], domain="com.microsoft", hidden_size=6)
    found = examine_onnx(of_nodes(tmp_path, [node], {"x": [5, "n", 4]}, codes))
    assert (found.parameters, found.parameter_bytes) == (10 * 24, 10 * 24)
    assert (found.macs, found.uncounted) == (5 * 10 * 24, ())
    gemm = ["a", "as", "az", "b", "bs", "bz", "c"]
    held = {"b": np.zeros((4, 3), np.int8), "c": np.zeros(3, np.int32), "bs": np.ones(3, np.float32)}
    held |= {"as": np.ones((), np.float32), "az": np.zeros((), np.uint8), "bz": np.zeros(3, np.int8)}
    node = onnx.helper.make_node("QGemm", gemm, ["y"], domain="com.microsoft")
    found = examine_onnx(of_nodes(tmp_path, [node], {"a": ["n", 4]}, held))
    assert (found.parameters, found.parameter_bytes) == (12 + 3, 12 + 4 * 3)


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


def test_side_files_in_folders_keep_their_way(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w.bin").write_bytes(b"\0" * 64)
    (tmp_path / "w.bin").write_bytes(b"another file's")
    found = examine_onnx(with_side_file(tmp_path, "weights/w.bin"))
    assert found.files == ("a.onnx", "weights/w.bin")


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", "w.bin\0x", ""])
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


@pytest.mark.parametrize("place", ["sparse", "constant", "function", "branch of a function"])
def test_fault_12_side_files_are_found_wherever_a_tensor_may_be(place: str, tmp_path: Path) -> None:
    """What names a file outside the folder is refused, though nothing here would read it."""
    path = with_side_file(tmp_path, "../secret.bin")
    model = onnx.load_model(str(path), load_external_data=False)
    tensor = model.graph.initializer[0]
    if place == "sparse":
        indices = onnx.numpy_helper.from_array(np.arange(3), "i")
        tensor.dims[:] = [3]
        model.graph.sparse_initializer.add(values=tensor, indices=indices, dims=[4, 4])
    else:
        holder = onnx.NodeProto(op_type="Constant", output=["w"])
        holder.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, t=tensor)
        if place == "branch of a function":
            branch = onnx.helper.make_graph([holder], "b", [], [onnx.ValueInfoProto(name="w")])
            holder = onnx.helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch)
        if place == "constant":
            model.graph.node.insert(0, holder)
        else:
            opsets = [onnx.helper.make_opsetid("", 18)]
            model.functions.append(onnx.helper.make_function("own", "F", [], ["w"], [holder], opsets))
    del model.graph.initializer[:]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(RejectedError, match=r"beside it. Got '../secret.bin'"):
        examine_onnx(path)


def test_a_tensor_of_no_known_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"\0" * 64)
    path = with_side_file(tmp_path, "w.bin")
    model = onnx.load_model(str(path), load_external_data=False)
    model.graph.initializer[0].data_type = 999
    path.write_bytes(model.SerializeToString())
    with pytest.raises(RejectedError, match=r"type that ONNX knows. Got number 999 for 'w'"):
        examine_onnx(path)


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


@pytest.mark.parametrize("kind", ["two that read each other", "one that doubles itself", "sixty sums of equal terms"])
def test_fault_14_codes_that_are_unpacked_in_circles_or_doublings(kind: str, tmp_path: Path) -> None:
    made = {
        "two that read each other": [("Cast", ["b"], "a"), ("Reshape", ["a", "shape"], "b")],
        "one that doubles itself": [("Add", ["a", "a"], "a")],
        "sixty sums of equal terms": [("Add", [f"v{k + 1}"] * 2, f"v{k}" if k else "a") for k in range(60)],
    }[kind]
    nodes = [
        onnx.helper.make_node(op, inputs, [output], **({"to": onnx.TensorProto.INT8} if op == "Cast" else {}))
        for op, inputs, output in made
    ]
    nodes.append(onnx.helper.make_node("DequantizeLinear", ["a", "scale"], ["y"]))
    graph = onnx.helper.make_graph(
        nodes, "g", [onnx.helper.make_tensor_value_info("v60", onnx.TensorProto.INT8, [4])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])],
        [onnx.helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [0.1]), onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [1], [4])],
    )  # fmt: skip
    path = tmp_path / "net.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), path)
    began = time.monotonic()
    assert examine_onnx(path).parameters == 0
    assert time.monotonic() - began < 10


def test_a_free_length_that_is_too_short_for_a_layer_is_not_counted(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.ones((4, 3, 3), dtype=np.float32), "w")
    value = onnx.helper.make_tensor_value_info
    nodes = [onnx.helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[3])]
    graph = onnx.helper.make_graph(
        nodes, "g", [value("x", onnx.TensorProto.FLOAT, ["n", 3, "length"])], [value("y", onnx.TensorProto.FLOAT, ["n", 4, "out"])],
        [weight],
    )  # fmt: skip
    path = tmp_path / "net.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), path)
    found = examine_onnx(path)
    assert found.macs == 0 and found.uncounted == ("Conv_0",)
