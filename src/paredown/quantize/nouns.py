"""Quantized and Packed: a network whose weights are integer codes, and the codes themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from paredown.program import Inputs, Program


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One weight as integer codes: weight = scales · (codes - zero_points), broadcast along `axis`.

    `group` is the number of neighbours that share a scale along the input axis, None for a whole channel (or, where
    `axis` is None, the whole tensor). `blocks` is the shape of the blocks that survive sparsity, None for dense.
    """

    codes: Tensor
    """Shape of the weight, dtype int8 (weights) or uint8 (constants that act as activations)."""
    scales: Tensor
    """float32, shape [channels], or [] per tensor."""
    zero_points: Tensor
    """int64, same shape as `scales`; 0 for symmetric weights."""
    bits: int = 8
    group: int | None = None
    axis: int | None = 0
    blocks: tuple[int, int] | None = None

    def unpack(self) -> Tensor:
        """The float32 weight that the codes stand for.

        >>> import torch
        >>> one = Packed(codes=torch.tensor([[-127, 127]]), scales=torch.tensor([0.5]), zero_points=torch.tensor([0]))
        >>> one.unpack().tolist()
        [[-63.5, 63.5]]
        """
        shape = [1] * self.codes.dim()
        if self.axis is not None:
            shape[self.axis] = -1
        return (self.codes.float() - self.zero_points.reshape(shape).float()) * self.scales.reshape(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A quantized network as PyTorch simulates it. `module` is called like the model it came from, in float32.

    The simulation rounds where the runtime will: weights are stored as codes and dequantized, activations pass
    through quantize and dequantize. `weights` are the codes by parameter name; exporters write exactly these.
    """

    module: fx.GraphModule
    program: Program
    """The float network that was quantized: capture of the tuned module, before batch norm was folded."""
    scheme: str
    target: str
    inputs: Inputs
    weights: Mapping[str, Packed]
    notes: tuple[str, ...] = ()
    """What stayed float and why, and what was odd about the calibration data."""
