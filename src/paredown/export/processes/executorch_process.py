"""ExecuTorch, in its own environment: programs into .pte files, and .pte files run, timed and opened. Run by serve.py."""

from __future__ import annotations

import collections
import io
import json
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Answer = tuple[dict[str, Any], list[Any]]
_TYPES = {0: "uint8", 1: "int8", 3: "int32", 4: "int64", 6: "float32", 7: "float64", 11: "bool"}
"""Scalar types of PyTorch by their number in a .pte file."""
_methods: list[Any] = []


def convert(question: dict[str, Any], arrays: list[Any]) -> Answer:
    """{"out": .pte, "about": text kept in the file} and the bytes of a program: lower to XNNPACK and write."""
    import torch
    import torch.ao.quantization.fx._decomposed  # the quantize and dequantize ops
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    # This unpickles: what comes through the pipe is paredown's own.
    program = torch.export.load(io.BytesIO(arrays[0].tobytes()))
    edge = to_edge_transform_and_lower(
        program, partitioner=[XnnpackPartitioner()], constant_methods={ABOUT: question["about"]}
    )
    Path(question["out"]).write_bytes(edge.to_executorch().buffer)
    return {}, []


ABOUT = "paredown"
"""A constant method of the file: names of the inputs and the structure of the outputs, as JSON."""


def load(question: dict[str, Any], arrays: list[Any]) -> Answer:
    """{"path", "threads"}: a number for the model, its inputs and what the file says about itself."""
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(question["threads"])
    program = Runtime.get().load_program(Path(question["path"]))
    method = program.load_method("forward")
    about = program.load_method(ABOUT).execute([])[0] if ABOUT in program.method_names else "{}"
    meta = method.metadata
    infos = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
    inputs = [{"shape": list(i.sizes()), "type": _TYPES.get(i.dtype(), str(i.dtype()))} for i in infos]
    _methods.append((program, method))
    return {"model": len(_methods) - 1, "inputs": inputs, "about": about}, []


def run(question: dict[str, Any], arrays: list[Any]) -> Answer:
    """{"model"} and the inputs: the outputs."""
    outputs = _methods[question["model"]][1].execute(_tensors(arrays))
    return {}, [o.numpy() for o in outputs]


def timed(question: dict[str, Any], arrays: list[Any]) -> Answer:
    """{"model", "runs"} and the inputs: milliseconds per run, the call from Python included."""
    method, inputs = _methods[question["model"]][1], _tensors(arrays)
    start = time.perf_counter_ns()
    for _ in range(question["runs"]):
        method.execute(inputs)
    return {"ms": (time.perf_counter_ns() - start) / question["runs"] / 1e6}, []


def _tensors(arrays: list[Any]) -> list[Any]:
    import torch

    return [torch.from_numpy(a) for a in arrays]


# ------------------------------------------------------------------------------------------------------------- inspect

_ROUNDED = ("xnn_datatype_qint8", "xnn_datatype_qcint8", "xnn_datatype_quint8")
_EDGES = ("XNNConvert", "XNNStaticReshape")
"""Changes between codes and float, and views."""
_KERNEL_EDGES = ("view_copy", "_clone_dim_order", "_to_dim_order_copy", "clone", "alias_copy", "sym_size")


def inspect(question: dict[str, Any], arrays: list[Any]) -> Answer:
    """{"path"}: what the file executes, in XNNPACK and outside of it; "outside" says why per kind of op."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary(Path(question["path"]).read_bytes()).program
    plan = next(p for p in program.execution_plan if p.name == "forward")
    int8_nodes, float_nodes, outside = list[str](), list[str](), collections.Counter[str]()
    number = 0
    for instruction in (i for chain in plan.chains for i in chain.instructions):
        call = instruction.instr_args
        if hasattr(call, "delegate_index"):
            blob = program.backend_delegate_data[plan.delegates[call.delegate_index].processed.index].data
            for kind, rounded in _xnnpack_nodes(bytes(blob)):
                (int8_nodes if rounded else float_nodes).append(f"{kind}: {number} in XNNPACK")
                number += 1
        elif hasattr(call, "op_index"):
            op = plan.operators[call.op_index]
            kind = op.name.rpartition("::")[2]
            if kind in _KERNEL_EDGES:
                continue
            outside[kind] += 1
            rounded = _scalar_type(plan.values[call.args[-1]].val) in (0, 1)
            (int8_nodes if rounded else float_nodes).append(f"{kind}: {number} in a portable kernel")
            number += 1
    known = _known_to_xnnpack()
    why = {True: "XNNPACK's partitioner takes it in other forms only", False: "XNNPACK's partitioner knows no such op"}
    reasons = {kind: f"{n}×: {why[kind in known]}" for kind, n in sorted(outside.items())}
    return {"int8": int8_nodes, "float": float_nodes, "outside": reasons, "delegates": len(plan.delegates)}, []


def _scalar_type(value: Any) -> int | None:
    """The number of the type of a tensor, or of the first tensor of a list; None for anything else."""
    kind = getattr(value, "scalar_type", None)
    return None if kind is None else int(kind)


def _known_to_xnnpack() -> set[str]:
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS

    return {str(c.target_name).partition(".")[0] for c in ALL_PARTITIONER_CONFIGS if c.target_name}


def _xnnpack_nodes(blob: bytes) -> Iterator[tuple[str, bool]]:
    """(kind, whether its result is codes) of every node of one delegate, in its order."""
    from executorch.backends.xnnpack import serialization
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
    graph = blob[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size]
    with tempfile.TemporaryDirectory() as folder:
        schema, data = Path(folder) / "schema.fbs", Path(folder) / "graph.bin"
        schema.write_bytes((Path(next(iter(serialization.__path__))) / "schema.fbs").read_bytes())
        data.write_bytes(graph)
        _flatc_decompile(folder, str(schema), str(data), ["--raw-binary"])
        text = (Path(folder) / "graph.json").read_text(encoding="utf-8")
    found = json.loads(re.sub(r": (-?)inf\b", r": \1Infinity", text))  # bounds of a clamp that has none
    kinds = {}
    for value in found["xvalues"]:
        union = value["xvalue_union"]
        tensor = union.get("tensor_value", union)
        kinds[tensor["id_out"]] = tensor.get("datatype")
    for node in found["xnodes"]:
        kind, union = node["xnode_union_type"], node["xnode_union"]
        if kind not in _EDGES:
            yield kind.removeprefix("XNN").removeprefix("_"), kinds.get(_output(union)) in _ROUNDED


def _output(union: dict[str, Any]) -> int:
    return int(union.get("output_id", union.get("output1_id", 0)))


ANSWERS = {"convert": convert, "load": load, "run": run, "timed": timed, "inspect": inspect}
