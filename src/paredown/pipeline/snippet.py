"""A dozen lines that run the recommended file, with its normalisation."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from paredown.export.openvino_session import PRECISION
from paredown.export.session import PRECISE
from paredown.program import Program
from paredown.quantize.batches import rows, tensors_of

_KINDS = {"bool": "bool_", "bfloat16": "float32"}
"""Names in NumPy 1 and 2, where they are others than PyTorch's."""


def input_of(program: Program) -> dict[str, Any]:
    """Name and shape of the first input, for the report; "N" stands for a free batch."""
    tensor = next(t for t in pytree.tree_leaves(program.inputs) if isinstance(t, Tensor))
    first = ["N"] if program.batch == "dynamic" else [int(tensor.shape[0])] if tensor.dim() else []
    name = next(iter(program.eval_graph.graph_signature.user_inputs), "input")
    return {"name": str(name), "shape": [*first, *[int(s) for s in tensor.shape[1:]]]}


def snippet(file: str, normalisation: str, program: Program, *, exact: bool = False) -> str:
    """Python text that loads the file in its runtime and runs it on one sample of the right shape.

    `exact`: no session option is needed, see export.session.has_exact_products.
    """
    tensors = [t for t in pytree.tree_leaves(program.inputs) if isinstance(t, Tensor)]
    kinds = [_KINDS.get(kind := str(t.dtype).removeprefix("torch."), kind) for t in tensors]
    values = ", ".join(
        f"np.zeros({[*t.shape]}, np.{k})" for t, k in zip(_per_run(program, tensors), kinds, strict=True)
    )
    how = " ".join(normalisation.split()) or "bring your data to the form that the model was trained on"
    if file.endswith(".xml"):
        return _openvino(file, how, values)
    if file.endswith((".pte", ".tflite")):
        return (_executorch if file.endswith(".pte") else _litert)(file, how, values)
    options = [
        "options = ort.SessionOptions()",
        f"options.add_session_config_entry{PRECISE!r}  # exact int8 sums on x86 without VNNI, too",
    ]
    given = "" if exact else "options, "
    return "\n".join(
        [
            "import numpy as np",
            "import onnxruntime as ort",
            "",
            *([] if exact else options),
            f"session = ort.InferenceSession({file!r}, {given}providers=['CPUExecutionProvider'])",
            f"# {how}",
            f"inputs = [{values}]  # put your samples here",
            "names = [i.name for i in session.get_inputs()]",
            "outputs = session.run(None, dict(zip(names, inputs)))",
            "for o, value in zip(session.get_outputs(), outputs):",
            "    print(o.name, value.shape)",
        ]
    )


def _per_run(program: Program, tensors: list[Tensor]) -> list[Tensor]:
    """Inputs of one run: one sample where the batch is free or was made so."""
    return tensors_of(rows(program.inputs, slice(0, 1))) if program.batch == "dynamic" else tensors


def _executorch(file: str, how: str, values: str) -> str:
    return "\n".join(
        [
            "import numpy as np",
            "import torch",
            "from executorch.runtime import Runtime  # in the environment that `paredown setup executorch-xnnpack` makes",
            "",
            f"method = Runtime.get().load_program({file!r}).load_method('forward')",
            f"# {how}",
            f"inputs = [{values}]  # put one sample here: the file runs one at a time",
            "for value in method.execute([torch.from_numpy(i) for i in inputs]):",
            "    print(tuple(value.shape))",
        ]
    )


def _litert(file: str, how: str, values: str) -> str:
    return "\n".join(
        [
            "import numpy as np",
            "from ai_edge_litert.interpreter import Interpreter  # in the environment that `paredown setup litert` makes",
            "",
            f"interpreter = Interpreter({file!r})",
            "interpreter.allocate_tensors()",
            f"# {how}",
            f"inputs = [{values}]  # put one sample here: the file runs one at a time",
            "for place, value in zip(interpreter.get_input_details(), inputs):",
            "    interpreter.set_tensor(place['index'], value)",
            "interpreter.invoke()",
            "for o in interpreter.get_output_details():",
            "    print(o['name'], interpreter.get_tensor(o['index']).shape)",
        ]
    )


def _openvino(file: str, how: str, values: str) -> str:
    return "\n".join(
        [
            "import numpy as np",
            "import openvino",
            "",
            f"options = {{'INFERENCE_PRECISION_HINT': {PRECISION!r}}}  # without it, bfloat16 where the processor can",
            f"# {how}",
            f"inputs = [{values}]  # put your samples here",
            "core = openvino.Core()",
            f"network = core.read_model({file!r})",
            "network.reshape({n: list(a.shape) for n, a in enumerate(inputs)})  # a free batch is not always answered rightly",
            "model = core.compile_model(network, 'CPU', options)",
            "outputs = model(inputs)",
            "for o in model.outputs:",
            "    print(o.any_name, outputs[o].shape)",
        ]
    )
