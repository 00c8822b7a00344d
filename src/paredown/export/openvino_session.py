"""An OpenVINO file on the CPU, called like an ONNX Runtime session."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paredown.errors import MissingError, RejectedError

PRECISION = "f32"
"""INFERENCE_PRECISION_HINT. Unless it is set, OpenVINO computes what is not int8 in bfloat16 where the processor can, a float file too."""
STRUCTURE = "outputs"
"""Key of the file's metadata that holds the structure of its outputs, where it is not one tensor."""
FORMAT = 11
"""Newest version of the .xml format that OpenVINO 2025 and 2026 read."""
APART = {"SNIPPETS_MODE": "DISABLE"}
_KEPT = 4
"""Shapes for which a compiled file is kept: each holds the weights once more."""
_TYPES = {
    "f32": "tensor(float)", "f64": "tensor(double)", "f16": "tensor(float16)", "bf16": "tensor(bfloat16)",
    "i64": "tensor(int64)", "i32": "tensor(int32)", "i16": "tensor(int16)", "i8": "tensor(int8)",
    "u64": "tensor(uint64)", "u32": "tensor(uint32)", "u16": "tensor(uint16)", "u8": "tensor(uint8)", "boolean": "tensor(bool)",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input of a file: `shape` has text for an axis that is free, `type` is named as ONNX Runtime names it."""

    name: str
    shape: list[int | str]
    type: str


def settings(threads: int, *, in_float: bool = False) -> dict[str, Any]:
    """What every session here sets: threads, one stream, float32. `in_float` keeps the plugin from making int8 layers."""
    more = {"LP_TRANSFORMS_MODE": "NO"} if in_float else {}
    pinned = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
    return {**pinned, "INFERENCE_PRECISION_HINT": PRECISION, **more}


def core() -> Any:
    """OpenVINO's one entry in this process; raises MissingError without OpenVINO.

    Every Core has a CPU plugin, which gives the thread a stack for its signals and puts the stack before it back when it ends (2026.4).
    Of two that end in the order in which they began the second puts back what the first has freed, and the next signal
    (Ctrl-C, a worker of a DataLoader that ends) is a segmentation fault.
    """
    try:
        import openvino
    except ImportError as error:
        msg = "running an .xml file must have OpenVINO. It is not installed. Run: pip install 'paredown[openvino]'."
        raise MissingError(msg) from error
    return _core(openvino)


@functools.cache
def _core(openvino: Any) -> Any:
    return openvino.Core()


class Session:
    """A file on the CPU, compiled once for every shape that it meets. Raises MissingError without OpenVINO, RejectedError where it refuses.

    With a free batch OpenVINO 2026.4 answers otherwise for a small vision transformer (0.034 off at scale 0.42, as if the patch
    convolution had no bias; why is not known), and as it should once the shape is fixed; `free` compiles a file as it is. `in_float` makes the weights of the model
    that was read float, and the quantization is then executed in float. `apart` keeps the plugin from fusing layers into one generated
    kernel: in OpenVINO 2026.4 that of two or more quantized dense layers answers nonsense for some shapes, on one thread and up to 8 samples.
    """

    note = f"INFERENCE_PRECISION_HINT={PRECISION}, NUM_STREAMS=1, compiled for the shape of the sample"

    def __init__(
        self, path: Path, *, threads: int = 1, free: bool = False, in_float: Callable[[Any], None] | None = None,
        apart: bool = False,
    ) -> None:  # fmt: skip
        self._path, self._free = path, free
        self._settings = settings(threads, in_float=in_float is not None) | (APART if apart else {})
        self._core = core()
        with self._explained():
            self._model = self._core.read_model(str(path))
            if in_float is not None:
                in_float(self._model)
        self.metadata = _metadata(self._model)
        self._inputs = [_input(value) for value in self._model.inputs]
        self._requests: dict[tuple[tuple[int, ...], ...], Any] = {}

    def get_inputs(self) -> list[Input]:
        """The inputs in the order of the network's own."""
        return self._inputs

    def run(self, _: None, feed: Mapping[str, Any]) -> list[Any]:
        """Outputs as arrays that are the caller's own."""
        request = self.request(feed)
        request.infer(dict(feed), share_inputs=True, share_outputs=True)
        return [np.array(request.get_output_tensor(i).data) for i in range(len(self._model.outputs))]

    def request(self, feed: Mapping[str, Any]) -> Any:
        """The compiled file for the shapes of that feed."""
        key = () if self._free else tuple(tuple(feed[i.name].shape) for i in self._inputs)
        if key not in self._requests:
            with self._explained():
                model = self._model
                if not self._free:
                    model = model.clone()
                    model.reshape({i.name: list(shape) for i, shape in zip(self._inputs, key, strict=True)})
                compiled = self._core.compile_model(model, "CPU", self._settings)
            if len(self._requests) >= _KEPT:
                del self._requests[next(iter(self._requests))]
            self._requests[key] = compiled.create_infer_request()
        return self._requests[key]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = next((t for t in reversed(str(error).strip().splitlines()) if t.strip()), "no message")[:300]
            if "unsupported opset" in reason or _format_version(self._path) > FORMAT:
                msg = f"OpenVINO must be new enough for the file. Got version {_version()} for {self._path.name}: {reason}. "
                raise MissingError(
                    msg + "Install a newer openvino, or export again with the one that runs it."
                ) from error
            msg = (
                f"an .xml file must load in OpenVINO {_version()} and fit its inputs. Got {self._path.name}: {reason}."
            )
            raise RejectedError(msg) from error


def _format_version(path: Path) -> int:
    """What <net version="11"> says; 0 where the file is none of OpenVINO's."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            found = re.search(r'<net[^>]*\bversion="(\d{1,6})"', file.read(4096))
    except OSError:
        return 0
    return int(found.group(1)) if found else 0


def _version() -> str:
    import openvino

    return str(openvino.__version__).partition("-")[0]


def _input(value: Any) -> Input:
    shape: list[int | str] = [d.get_length() if d.is_static else "?" for d in value.get_partial_shape()]
    name = value.get_element_type().get_type_name()
    return Input(name=value.any_name, shape=shape, type=_TYPES.get(name, f"tensor({name})"))


def _metadata(model: Any) -> dict[str, str]:
    """What the ONNX graph said of its outputs' structure; OpenVINO keeps it under "framework"."""
    place = ["framework", STRUCTURE]
    return {STRUCTURE: str(model.get_rt_info(place).astype(str))} if model.has_rt_info(place) else {}


__all__ = ["PRECISION", "STRUCTURE", "Input", "Session", "core", "settings"]
