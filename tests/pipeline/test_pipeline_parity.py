"""The gate between an INT8 file and its simulation: a bound in points, but never finer than the samples can tell."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from paredown.errors import VerificationError
from paredown.pipeline.stages import _refuse_far
from paredown.records import Measured, Record


def gate(unit: str, file: float, simulated: float, n: int) -> None:
    def number(value: float) -> Measured:
        return Measured(value=value, unit=unit, badge="measured", n=n, protocol="test")

    run = SimpleNamespace(task=SimpleNamespace(metric=SimpleNamespace(unit=unit, name="metric")))
    _refuse_far(run, Record(cell={}, measured={"metric": number(file), "simulated_metric": number(simulated)}))


@pytest.mark.parametrize(
    ("unit", "file", "simulated", "n", "holds"),
    [
        ("%", 90.0, 90.15, 10_000, True),
        ("%", 90.0, 90.3, 10_000, False),
        ("%", 90.0, 90.5, 200, True),  # one sample of 200
        ("%", 90.0, 91.0, 200, True),
        ("%", 90.0, 91.5, 200, False),  # three
        ("g", 100.0, 100.1, 50, True),
        ("g", 100.0, 101.0, 50, False),  # a mean error does not come in steps
    ],
)
def test_the_gate(unit: str, file: float, simulated: float, n: int, holds: bool) -> None:
    if holds:
        gate(unit, file, simulated, n)
        assert file <= simulated
        return
    with pytest.raises(VerificationError, match="must be within"):
        gate(unit, file, simulated, n)
