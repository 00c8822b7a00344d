"""Every structural hazard: quantized, exported, executed, compared. Long: minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hazards

pytest.importorskip("onnxscript")
pytest.importorskip("torchao")
import hazards_tokens  # noqa: F401  (registers more hazards)
from paredown.errors import RejectedError
from paredown.export import check, export
from paredown.program import capture
from paredown.quantize import quantize

NO_TRANSLATION = {  # a custom op; adaptive max pool; a form of LSTM
    "custom_op": "translation to ONNX",
    "flatten_linear": "translation to ONNX",
    "projected": "no projection in ONNX",
}


FLOAT_CONVOLUTION = {"state_by_hand"}
"""ONNX Runtime executes its first convolution, which is called twice on one input, in float; why is not known."""


@pytest.mark.slow
@pytest.mark.parametrize("name", list(hazards.HAZARDS))
def test_hazard(name: str, tmp_path: Path) -> None:
    try:
        net = hazards.fresh(name)
    except ImportError as error:
        pytest.skip(f"needs a library that cannot be imported: {error}")

    def batch(size: int) -> dict[str, object]:
        return dict(zip(("args", "kwargs"), hazards.HAZARDS[name].inputs(size), strict=True))

    program = capture(net, batch(2), train=False)
    size = 3 if program.batch == "dynamic" else 2
    torch.manual_seed(1)
    if name in NO_TRANSLATION:
        with pytest.raises(RejectedError, match=NO_TRANSLATION[name]):
            export(program, tmp_path / "a.onnx")
        return
    assert check(export(program, tmp_path / "a.onnx"), program, [batch(size)]).holds
    quantized = quantize(program, calibrate=[batch(size) for _ in range(12)])
    result = check(export(quantized, tmp_path / "b.onnx"), quantized, [batch(size)])
    assert result.holds
    in_float = [n for n in result.float_nodes if n.startswith(("Conv:", "FusedConv:"))]
    assert bool(in_float) == (name in FLOAT_CONVOLUTION), in_float
