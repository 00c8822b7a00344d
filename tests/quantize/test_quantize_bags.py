"""nn.EmbeddingBag: rows of a table in float, in codes, and in files that hold no loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from paredown.export import check, export
from paredown.program import capture
from paredown.quantize import quantize
from paredown.quantize.bags import has_bags, plain_bags

SUFFIXES = {"onnxruntime-x86": ".onnx", "openvino-x86": ".xml"}


class Bags(nn.Module):
    """All kinds of bags that hold as many words each."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.EmbeddingBag(30, 8, mode="mean")
        self.largest = nn.EmbeddingBag(30, 8, mode="max")
        self.some = nn.EmbeddingBag(30, 8, mode="mean", padding_idx=2)
        self.total = nn.EmbeddingBag(30, 8, mode="sum", padding_idx=2)
        self.head = nn.Linear(32, 3)

    def forward(self, words: Tensor, weights: Tensor) -> Tensor:
        bags = self.mean(words), self.largest(words), self.some(words), self.total(words, per_sample_weights=weights)
        return self.head(torch.cat(bags, 1))


def samples(batch: int) -> tuple[Tensor, Tensor]:
    words = torch.randint(0, 30, (batch, 6))
    words[0] = 2  # a bag of nothing but padding
    return words, torch.rand(batch, 6)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Bags().eval()


def test_rows_are_what_a_bag_is(net: nn.Module) -> None:
    graph = capture(net, samples(4), train=False).eval_graph.module(check_guards=False)
    plain_bags(graph)
    assert not has_bags(graph.graph)
    for batch in (2, 7):
        given = samples(batch)
        torch.testing.assert_close(graph(*given), net(*given), rtol=1e-5, atol=1e-6)


def test_bags_of_other_lengths_stay_as_they_are() -> None:
    class Offsets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(30, 8)

        def forward(self, words: Tensor, offsets: Tensor) -> Any:
            return self.bag(words, offsets)

    given = torch.randint(0, 30, (9,)), torch.tensor([0, 2, 7])
    graph = capture(Offsets().eval(), given, train=False).eval_graph.module(check_guards=False)
    plain_bags(graph)
    assert has_bags(graph.graph)


@pytest.mark.parametrize("target", list(SUFFIXES))
def test_files_have_no_loop_and_take_any_batch(target: str, net: nn.Module, tmp_path: Path) -> None:
    if target == "openvino-x86":
        pytest.importorskip("openvino")
    pytest.importorskip("torchao")
    program, x = capture(net, samples(4), train=False), samples(8)
    for scheme in ("fp32", "fp16", "int8", *(["int8-dynamic"] if target != "openvino-x86" else [])):
        thing = program if scheme == "fp32" else quantize(program, scheme=scheme, calibrate=[x], target=target)
        artifact = export(thing, tmp_path / f"{scheme}{SUFFIXES[target]}", target=target)
        assert check(artifact, thing, [x, samples(3)]).holds
        if target == "onnxruntime-x86":
            assert "Loop" not in {n.op_type for n in onnx.load(artifact.path).graph.node}
        if scheme == "int8-dynamic":  # tables in codes are what such a network weighs
            assert {n for n in thing.weights if n.endswith(".weight")} == {
                n for n, p in net.named_parameters() if p.dim() > 1
            }
