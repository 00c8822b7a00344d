"""Results whose int8 kernel has one scale and takes no other: that scale, whatever calibration sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from paredown.quantize.decompose import op_name
from paredown.quantize.observe import Ranged

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
