"""Examine: MACs, parameters, bytes and activation memory of a program or a file."""

from __future__ import annotations

from paredown.examine.cost import Cost, NodeCost, Shrink, ShrinkPlan, Uncounted
from paredown.examine.onnx_file import OnnxCost, examine_onnx
from paredown.examine.shrink import shrink_to
from paredown.examine.size import FileSize, StateSize, file_size, state_size
from paredown.examine.walk import examine

__all__ = [
    "Cost",
    "FileSize",
    "NodeCost",
    "OnnxCost",
    "Shrink",
    "ShrinkPlan",
    "StateSize",
    "Uncounted",
    "examine",
    "examine_onnx",
    "file_size",
    "shrink_to",
    "state_size",
]
