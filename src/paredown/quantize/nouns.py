"""Quantized and Packed: a network whose weights are integer codes, and the codes themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from paredown.program import Inputs, Program
from paredown.quantize.schemes import Levels


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One weight as integer codes: weight = scales · (codes - zero_points), broadcast along `axis`.

    `group` is the number of neighbours that share a scale along the input axis, None for a whole channel (or, where
    `axis` is None, the whole tensor). `blocks` is the shape of the blocks that survive sparsity, None for dense.
    """

    codes: Tensor
    """Shape of the weight, dtype int8 (weights) or uint8 (constants that act as activations)."""
    scales: Tensor
    """float32, shape [channels], [channels, groups] where a group shares one, or [] per tensor."""
    zero_points: Tensor
    """int64, same shape as `scales`; 0 for symmetric weights."""
    bits: int = 8
    group: int | None = None
    axis: int | None = 0
    blocks: tuple[int, int] | None = None
    levels: Levels = "integer"
    """Balanced codes are odd (±1, ±3 with two bits), ternary -1, 0, 1 (five of them fit into a byte), binary -1 and 1."""

    def unpack(self) -> Tensor:
        """The float32 weight that the codes stand for. With `group`, `scales` are [channels, groups], `axis` the channels'.

        >>> import torch
        >>> one = Packed(codes=torch.tensor([[-127, 127]]), scales=torch.tensor([0.5]), zero_points=torch.tensor([0]))
        >>> one.unpack().tolist()
        [[-63.5, 63.5]]
        """
        if self.group is not None:
            return self._unpack_groups(self.group, self.axis or 0)
        shape = [1] * self.codes.dim()
        if self.axis is not None:
            shape[self.axis] = -1
        return (self.codes.float() - self.zero_points.reshape(shape).float()) * self.scales.reshape(shape)

    def _unpack_groups(self, group: int, axis: int) -> Tensor:
        """Every channel's other axes as one row, `group` neighbours at a time; the last group may be shorter."""
        moved = self.codes.movedim(axis, 0)
        rows = moved.reshape(moved.shape[0], -1)
        scales, zeros = (
            v.reshape(rows.shape[0], -1).repeat_interleave(group, dim=1)[:, : rows.shape[1]]
            for v in (self.scales, self.zero_points)
        )
        return ((rows.float() - zeros.float()) * scales).reshape(moved.shape).movedim(0, axis)


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How often values occur: `counts` of equal bins from `low` to `high`; values that are exactly 0 stand in `zeros`."""

    low: float
    high: float
    counts: tuple[int, ...]
    zeros: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of a network runs on integer codes, both as shares from 0 to 1."""

    macs: float
    """Of the multiply-accumulates of one sample: those with a weight that is held in codes."""
    weights: float
    """Of the numbers in weights with two or more axes (matrices, kernels, tables; no biases, no norms)."""


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
    coverage: Coverage | None = None
    """Known for the schemes that need no calibration."""
