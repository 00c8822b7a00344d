from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deploy_nets

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from paredown.errors import RejectedError
from paredown.export import check, export, predictor
from paredown.program import capture


def test_file_and_module_answer_alike_in_the_models_own_structure(tmp_path: Path) -> None:
    net, inputs = deploy_nets.made("named")
    program = capture(net, inputs(2))
    by_file, by_module, by_program = (
        predictor(t) for t in (export(program, tmp_path / "a.onnx"), net.train(), program)
    )
    for batch in (1, 2, 9):
        image, table = inputs(batch)["args"][0], inputs(batch)["kwargs"]["table"]
        answers = [f(image, table=table) for f in (by_file, by_module, by_program)]
        for answer in answers:
            assert list(answer) == ["kind", "rest"]
            assert isinstance(answer["rest"], tuple)
            assert answer["rest"][1].dtype == torch.float32
            torch.testing.assert_close(answer["kind"], answers[1]["kind"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(answer["rest"][1], answers[1]["rest"][1], rtol=1e-4, atol=1e-5)
        assert answers[0].kind is answers[0]["kind"]  # as models from Hugging Face are read
    assert net.training
    assert not answers[1]["kind"].requires_grad


def test_outputs_that_are_none_or_nested(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return [x * 2, None, {"deep": (x + 1,)}]

    artifact = export((Mixed(), torch.randn(2, 3)), tmp_path / "a.onnx")
    x = torch.randn(4, 3)
    first, nothing, rest = predictor(artifact)(x)
    torch.testing.assert_close(first, x * 2)
    assert nothing is None
    torch.testing.assert_close(rest["deep"][0], x + 1)


def test_a_fixed_batch_is_run_in_pieces(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).reshape(4, 2)

    net = Fixed().eval()
    program = capture(net, torch.randn(4, 3))
    assert program.batch.startswith("fixed")
    artifact = export(program, tmp_path / "a.onnx")
    x = torch.randn(10, 3)
    predict = predictor(artifact)
    torch.testing.assert_close(predict(x), net.linear(x), rtol=1e-5, atol=1e-6)
    assert predict(x[:1]).shape == (1, 2)
    assert check(artifact, program, [torch.randn(4, 3)]).holds


def test_inputs_that_do_not_fit_are_named(tmp_path: Path) -> None:
    net, inputs = deploy_nets.made("named")
    predict = predictor(export((net, inputs(2)), tmp_path / "a.onnx"))
    with pytest.raises(RejectedError, match="image, table"):
        predict(torch.zeros(2, 3, 8, 8))


def test_check_needs_samples(tmp_path: Path) -> None:
    net, inputs = deploy_nets.made("residual")
    artifact = export((net, inputs(2)), tmp_path / "a.onnx")
    with pytest.raises(RejectedError, match="at least one sample"):
        check(artifact, net, [])
