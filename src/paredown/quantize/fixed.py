"""Results whose range is not the chosen observer's to find: a kernel takes one scale and no other, or large values are what matters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx
from torchao.quantization.pt2e.quantizer import QuantizationSpec, SharedQuantizationSpec

from paredown.quantize.decompose import op_name
from paredown.quantize.observe import MinMax, Ranged

_KEY = "quantization_annotation"


class FixedRange(Ranged):
    """The observer of such a result: its range is known before anything passes."""

    def __init__(self, *, low: float, high: float, **spec: Any) -> None:
        self.low, self.high = low, high
        super().__init__(**spec)

    def look(self, values: Tensor, low: float, high: float) -> None:
        """Nothing is kept."""

    def range(self) -> tuple[float, float]:
        """The range that was given."""
        return self.low, self.high


def fix_results(
    nodes: Iterable[fx.Node], fixed: Mapping[str, tuple[float, float]], activation: QuantizationSpec
) -> None:
    """Give the results of those ops their range, in the annotations of the op and of whoever reads them as codes.

    `activation` is the spec of all other activations; `fixed` has (smallest, largest value) by op.
    """
    specs: dict[tuple[float, float], QuantizationSpec] = {}
    for node in nodes:
        bounds, told = fixed.get(op_name(node)), node.meta.get(_KEY)
        if bounds is None or told is None or not isinstance(told.output_qspec, QuantizationSpec):
            continue
        made = FixedRange.with_args(low=bounds[0], high=bounds[1])
        spec = specs.setdefault(bounds, dataclasses.replace(activation, observer_or_fake_quant_ctr=made))
        told.output_qspec = spec
        for reader in node.users:
            asked = reader.meta[_KEY].input_qspec_map if _KEY in reader.meta else {}
            if isinstance(asked.get(node), QuantizationSpec):
                asked[node] = spec


GATES = frozenset("sigmoid sigmoid_ hardsigmoid hardsigmoid_ softmax _softmax".split())
"""Results from 0 to 1, most of them small, of which the rare large ones decide."""


def widen_gates(nodes: Iterable[fx.Node]) -> None:
    """Let results of `GATES` have all of their range, in the annotations of the op, of who reads them and of what moves them.

    A threshold of least divergence cuts a gate that is nearly always closed to what it is then (see observe.Entropy).
    """
    waiting = [n for n in nodes if op_name(n) in GATES]
    for node in waiting:  # grows as it is gone through
        told = node.meta.get(_KEY)
        if told is not None and isinstance(told.output_qspec, QuantizationSpec):
            told.output_qspec = _whole(told.output_qspec)
        for reader in node.users:
            asked = reader.meta[_KEY].input_qspec_map if _KEY in reader.meta else {}
            if isinstance(asked.get(node), QuantizationSpec):
                asked[node] = _whole(asked[node])
                if isinstance(reader.meta[_KEY].output_qspec, SharedQuantizationSpec):  # it only moves them
                    waiting.append(reader)


def _whole(spec: QuantizationSpec) -> QuantizationSpec:
    return dataclasses.replace(spec, observer_or_fake_quant_ctr=MinMax)
