"""What `paredown.sweep.serve` forks for every model: the libraries are loaded once, a model has a limit of its own.

The limit of memory is on the address space, so that what is only reserved counts as well: a model asks for more than the
machine has in one go, faster than anybody could look.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections.abc import Callable, Mapping
from typing import Any

from paredown.coverage import one
from paredown.errors import ParedownError
from paredown.export.onnxruntime import load_translations
from paredown.models import load_model

_LIBRARIES = ("torchvision:squeezenet1_1", "timm:test_vit")
"""A small model of each: what is common to all models of the library is loaded with it."""
LOADS = (
    "torch._dynamo",
    "torch.export._trace",
    "torch.export._unlift",
    "torch._export.non_strict_utils",
    "onnxruntime",
    "onnxscript",
    "torch.onnx._internal.exporter._core",
    "networkx",
)
"""What PyTorch loads at the first capture and the first export. Only imported: a tensor would start threads, which forks lose."""


def prepare() -> None:
    """Load the zoos, in the server, and what every export would make anew."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when timm is imported
    for spec in _LIBRARIES:
        with contextlib.suppress(ParedownError):  # not installed: models that need it will say so
            load_model(spec)
    load_translations()


def main(request: Mapping[str, Any], emit: Callable[[Mapping[str, Any]], None]) -> None:
    """Fill the rows of one model, in a fork; {"asked", "memory_bytes"}."""
    memory = request.get("memory_bytes")
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    one.main(json.dumps(request["asked"]), emit)
