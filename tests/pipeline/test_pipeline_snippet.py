"""The dozen lines of a report run the file of the report, whatever its inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import forked
from paredown.export import export
from paredown.pipeline.snippet import snippet
from paredown.program import capture

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Anchored(nn.Module):
    """A batch, a mask for each sample, and anchors that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor, anchors: Tensor) -> Tensor:
        return (self.a(x) * mask) @ anchors.T


@pytest.mark.parametrize("name", ["net.onnx", "net.xml"])
def test_it_runs_with_several_inputs_of_which_not_all_have_samples(name: str, tmp_path: Path) -> None:
    target = "onnxruntime-x86"
    if name.endswith(".xml"):
        pytest.importorskip("openvino")
        target = "openvino-x86"
    inputs = (torch.randn(2, 4), torch.ones(2, 4, dtype=torch.bool), torch.randn(5, 4))
    program = capture(Anchored().eval(), inputs)
    assert program.batch == "dynamic"
    export(program, tmp_path / name, target=target)
    done = forked.run(snippet(name, "none", program), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1)[1].strip() == "(1, 5)"
