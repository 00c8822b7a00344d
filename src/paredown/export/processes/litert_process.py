"""LiteRT, in its own environment: programs into .tflite files, and .tflite files run, timed and opened. Run by serve.py."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

Answer = tuple[dict[str, Any], list[Any]]
ABOUT = "paredown"
"""The file's metadata entry with the names of the inputs and the structure of the outputs, as JSON."""
_interpreters: list[Any] = []


def convert(question: dict[str, Any], arrays: list[Any]) -> Answer:
    """{"out": .tflite, "about": text kept in the file, "int8", "half"} and the bytes of a program: convert and write.

    A graph with quantize and dequantize ops becomes int8 ops where the converter is told so, which its own quantizer's
    configuration does; nothing else of that configuration is used. Its inputs and outputs then are codes: the file gets them
    back in float, as those of every other target are.
    """
    import litert_torch
    import torch
    import torch.ao.quantization.fx._decomposed  # the quantize and dequantize ops
    from ai_edge_litert import schema_py_generated as schema

    # This unpickles: what comes through the pipe is paredown's own.
    program = torch.export.load(io.BytesIO(arrays[0].tobytes()))
    args, kwargs = program.example_inputs
    made = litert_torch.convert(
        program.module(check_guards=False), args, kwargs or None, quant_config=_static() if question["int8"] else None
    )
    made.export(question["out"])
    data = Path(question["out"]).read_bytes()
    if question["half"]:
        data = _halved(data)
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    _float_edges(model, schema)
    _tell(model, schema, question["about"])
    Path(question["out"]).write_bytes(_packed(model))
    return {}, []


def _static() -> Any:
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig

    return QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(get_symmetric_quantization_config()))


def _halved(data: bytes) -> bytes:
    """Weights as float16, which the runtime unpacks to float32 when it loads the file."""
    from ai_edge_quantizer import quantizer

    made = quantizer.Quantizer(data)
    made.add_weight_only_config(".*", "*", num_bits=16, algorithm_key="float_casting")
    return bytes(made.quantize(enable_progress_bar=False, enable_progress_report=False).quantized_model)


def _float_edges(model: Any, schema: Any) -> None:
    """Inputs and outputs of codes in float again: one QUANTIZE before the graph, one DEQUANTIZE behind it."""
    graph, kinds = model.subgraphs[0], schema.BuiltinOperator
    for side, kind in (("inputs", kinds.QUANTIZE), ("outputs", kinds.DEQUANTIZE)):
        edges = [int(i) for i in getattr(graph, side)]
        for position, index in enumerate(edges):
            codes = graph.tensors[index]
            if codes.type != schema.TensorType.INT8 or codes.quantization is None or codes.quantization.scale is None:
                continue
            value = schema.TensorT()
            value.type, value.shape, value.shapeSignature = schema.TensorType.FLOAT32, codes.shape, codes.shapeSignature
            value.buffer, value.name, codes.name = 0, codes.name, codes.name + b"_codes"
            graph.tensors.append(value)
            number = len(graph.tensors) - 1
            op = schema.OperatorT()
            op.opcodeIndex = _code(model, schema, kind)
            op.inputs, op.outputs = ([number], [index]) if side == "inputs" else ([index], [number])
            graph.operators.insert(0 if side == "inputs" else len(graph.operators), op)
            edges[position] = number
            for signature in model.signatureDefs or []:
                for entry in getattr(signature, side):
                    entry.tensorIndex = number if entry.tensorIndex == index else entry.tensorIndex
        setattr(graph, side, edges)


def _code(model: Any, schema: Any, kind: int) -> int:
    """The place of an operator in the file's list of operators, where it is added if need be."""
    for number, known in enumerate(model.operatorCodes):
        if known.builtinCode == kind:
            return number
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = kind
    code.version = 2  # int8
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def _tell(model: Any, schema: Any, text: str) -> None:
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = list(text.encode())
    model.buffers.append(buffer)
    entry.name, entry.buffer = ABOUT, len(model.buffers) - 1
    model.metadata = [*(model.metadata or []), entry]


def _packed(model: Any) -> bytes:
    import flatbuffers

    packer = flatbuffers.Builder(1 << 20)
    packer.Finish(model.Pack(packer), b"TFL3")
    return bytes(packer.Output())


def load(question: dict[str, Any], arrays: list[Any]) -> Answer:
    """{"path", "threads"}: a number for the model, its inputs and what the file says about itself."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=question["path"], num_threads=question["threads"])
    interpreter.allocate_tensors()
    _interpreters.append(interpreter)
    details = interpreter.get_input_details()
    inputs = [{"shape": [int(d) for d in i["shape"]], "type": i["dtype"].__name__} for i in details]
    return {"model": len(_interpreters) - 1, "inputs": inputs, "about": _about(Path(question["path"]))}, []


def _about(path: Path) -> str:
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    for entry in (model.Metadata(i) for i in range(model.MetadataLength())):
        if entry.Name() == ABOUT.encode():
            return bytes(model.Buffers(entry.Buffer()).DataAsNumpy()).decode()
    return "{}"


def run(question: dict[str, Any], arrays: list[Any]) -> Answer:
    """{"model"} and the inputs: the outputs."""
    interpreter = _fed(question, arrays)
    interpreter.invoke()
    return {}, [interpreter.get_tensor(o["index"]) for o in interpreter.get_output_details()]


def timed(question: dict[str, Any], arrays: list[Any]) -> Answer:
    """{"model", "runs"} and the inputs: milliseconds per run of the graph; inputs and outputs are not copied."""
    interpreter = _fed(question, arrays)
    start = time.perf_counter_ns()
    for _ in range(question["runs"]):
        interpreter.invoke()
    return {"ms": (time.perf_counter_ns() - start) / question["runs"] / 1e6}, []


def _fed(question: dict[str, Any], arrays: list[Any]) -> Any:
    interpreter = _interpreters[question["model"]]
    for detail, array in zip(interpreter.get_input_details(), arrays, strict=True):
        interpreter.set_tensor(detail["index"], array.astype(detail["dtype"], copy=False))
    return interpreter


_VIEWS = ("RESHAPE", "SQUEEZE", "EXPAND_DIMS")


def inspect(question: dict[str, Any], arrays: list[Any]) -> Answer:
    """{"path"}: the ops of the file by the type of their result, and how many ops XNNPACK left to LiteRT's own kernels."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(Path(question["path"]).read_bytes(), 0))
    graph = model.subgraphs[0]
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if not k.startswith("_")}
    int8_nodes, float_nodes = [], []
    for op in graph.operators:
        code = model.operatorCodes[op.opcodeIndex]
        kind = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
        result, source = graph.tensors[op.outputs[0]], graph.tensors[op.inputs[0]]
        label = f"{kind}: {result.name.decode(errors='replace').partition(';')[0]}"
        if kind in _VIEWS or kind == "DEQUANTIZE" or (kind == "QUANTIZE" and source.type == schema.TensorType.FLOAT32):
            continue
        if result.type in (schema.TensorType.INT8, schema.TensorType.UINT8):
            int8_nodes.append(label)
        elif result.type in (schema.TensorType.FLOAT32, schema.TensorType.FLOAT16):
            float_nodes.append(label)
    return {"int8": int8_nodes, "float": float_nodes}, []


ANSWERS = {"convert": convert, "load": load, "run": run, "timed": timed, "inspect": inspect}
