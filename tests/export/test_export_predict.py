from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import deploy_nets

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from paredown.errors import RejectedError
from paredown.export import check, export, predictor
from paredown.export.session import open_session
from paredown.program import capture
from paredown.quantize import quantize


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


class Sequence(nn.Module):
    """Tokens first, samples second: with one sample the first axis is not the batch."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.reshape(1, 3, 2).transpose(0, 1), torch.arange(5.0)


def test_outputs_of_another_first_axis_are_whole_or_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(0), nn.Linear(64, 10)).eval()
    x = torch.randn(1, 1, 8, 8)
    program = capture(net, x)
    assert program.batch.startswith("fixed")
    artifact = export(program, tmp_path / "a.onnx")
    assert check(artifact, program, [x]).holds
    torch.testing.assert_close(predictor(artifact)(x), net(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(RejectedError, match=r"1 at a time, since output 0 .*Got 2"):
        predictor(artifact)(torch.cat([x, x + 1]))
    two = torch.randn(1, 6)
    predict = predictor(export((Sequence(), two), tmp_path / "b.onnx"))
    assert [t.shape for t in predict(two)] == [(3, 1, 2), (5,)]


def test_one_value_returned_twice_is_two_outputs_by_their_names(tmp_path: Path) -> None:
    import onnxruntime

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.drop = nn.Linear(3, 2), nn.Dropout()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.a(x)
            return {"first": y, "logits": self.drop(y), "again": y}

    net, x = Twice().eval(), torch.randn(4, 3)
    program = capture(net, x[:2])
    artifact = export(program, tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(artifact.path, providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == ["first", "logits", "again"]
    answers = [session.run([n], {session.get_inputs()[0].name: x.numpy()})[0] for n in ("first", "logits", "again")]
    for answer in answers:
        torch.testing.assert_close(torch.from_numpy(answer), net.a(x), rtol=1e-5, atol=1e-6)
    assert check(artifact, program, [x]).holds
    quantized = quantize(program, calibrate=[x])
    coded = export(quantized, tmp_path / "b.onnx")
    session = onnxruntime.InferenceSession(coded.path, providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == ["first", "logits", "again"]


class Pair(NamedTuple):
    logits: Tensor
    boxes: Tensor


@dataclasses.dataclass
class Answer:
    logits: Tensor
    boxes: Tensor


torch.export.register_dataclass(Answer)


@pytest.mark.parametrize("kind", [Pair, Answer, "numbers"])
def test_named_tuples_dataclasses_and_numbered_dicts_stay_what_they_are(tmp_path: Path, kind: Any) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {0: x * 2, 1: x + 1} if kind == "numbers" else kind(logits=x * 2, boxes=x + 1)

    x = torch.randn(2, 3)
    artifact = export((Net(), x), tmp_path / "a.onnx")
    for answer in (predictor(artifact)(x), predictor(Net())(x)):
        found = (answer[0], answer[1]) if kind == "numbers" else (answer.logits, answer.boxes)
        torch.testing.assert_close(found, (x * 2, x + 1))
    if kind is Pair:
        logits, boxes = predictor(artifact)(x)
        assert logits.equal(predictor(artifact)(x)[0]) and boxes.shape == (2, 3)
    names = [o.name for o in open_session(artifact.path).get_outputs()]
    assert names == (["output_0", "output_1"] if kind == "numbers" else ["logits", "boxes"])


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
