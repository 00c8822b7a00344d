"""Schemes without calibration: the codes, what is covered, and what stays float and why. The runtime's side is in tests/export."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import deploy_nets
from paredown.errors import NothingToDo, UsageError
from paredown.program import Program, capture
from paredown.quantize import SCHEMES, quantize
from paredown.quantize.dynamic import pack
from paredown.quantize.simulate import dynamic_codes


def made(net: nn.Module, *shape: int) -> Program:
    return capture(net.eval(), torch.randn(*shape), train=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40), st.floats(-100, 100, width=32))
def test_codes_of_an_activation_are_those_of_the_onnx_operator(values: list[float], shift: float) -> None:
    reference = pytest.importorskip("onnx.reference")
    from onnx import helper

    x = (np.array(values, np.float32) + np.float32(shift)).astype(np.float32)
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    io = [helper.make_tensor_value_info("x", 1, [None])], [helper.make_empty_tensor_value_info(n) for n in "qsz"]
    model = helper.make_model(helper.make_graph([node], "g", *io), opset_imports=[helper.make_opsetid("", 18)])
    q, s, z = reference.ReferenceEvaluator(model).run(None, {"x": x})
    codes, scale = dynamic_codes(torch.from_numpy(x))
    if not x.any():  # the reference divides by 0 there; the runtime takes a scale of 1
        assert codes.tolist() == [0.0] * len(x)
        return
    assert float(scale) == pytest.approx(float(s), rel=1e-6)
    assert np.abs(codes.numpy() - (q.astype(np.float32) - np.float32(z))).max() <= 1


@pytest.mark.parametrize("shape", [(5, 7), (3, 64), (1, 33)])
def test_int8_codes_are_those_of_torch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(*shape)
    packed = pack(weight, SCHEMES["int8-dynamic"])
    zeros = torch.zeros(shape[0], dtype=torch.int64)
    oracle = torch.quantize_per_channel(weight, packed.scales.double(), zeros, 0, torch.qint8).int_repr()
    assert torch.equal(packed.codes, oracle)
    assert packed.codes.abs().amax(dim=1).tolist() == [127] * shape[0]
    assert bool(((weight - packed.unpack()).abs() <= packed.scales[:, None] * 0.5001).all())


def test_w4_scales_are_near_the_best_of_a_finer_search() -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(3, 70)).astype(np.float32)
    weight[0, 5] = 9.0  # one group with a value far out
    packed = pack(torch.from_numpy(weight), SCHEMES["w4"])
    assert tuple(packed.scales.shape) == (3, 3)
    assert bool((packed.scales > 0).all())
    assert (int(packed.codes.min()), int(packed.codes.max())) == (-8, 7)
    assert not packed.zero_points.any()
    unpacked = packed.unpack().numpy()
    for row in range(3):
        for start in (0, 32):  # the last group has six values, which a finer search fits by chance
            group = weight[row, start : start + 32].astype(np.float64)
            mine = ((unpacked[row, start : start + 32] - group) ** 2).sum()
            tried = [
                s * np.clip(np.rint(group / s), -8, 7) for s in np.abs(group).max() / 7 * np.linspace(0.2, 1.0, 2000)
            ]
            assert mine <= 1.1 * min(((t - group) ** 2).sum() for t in tried) + 1e-9


class Odd(nn.Module):
    """A product with a parameter [inputs, outputs], a slice of a parameter as a weight, a weight used twice, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.twice = nn.Embedding(40, 32), nn.Linear(32, 32)
        self.right, self.both = nn.Parameter(torch.randn(32, 32) / 6), nn.Parameter(torch.randn(64, 32) / 6)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.twice(torch.relu(self.twice(self.table(ids))))
        x = torch.relu(x @ self.right)
        first, second = self.both.chunk(2)
        return self.head(nn.functional.linear(x, first) + nn.functional.linear(x, second))


def test_every_form_of_a_weight_is_packed_once() -> None:
    torch.manual_seed(0)
    net = Odd().eval()
    program = capture(net, torch.randint(0, 40, (2, 6)), train=False)
    quantized = quantize(program, scheme="int8-dynamic")
    weights = quantized.weights
    assert len(weights) == 5
    assert sum("both" in n for n in weights) == 2
    for name, tensor in (("twice.weight", net.twice.weight), ("right", net.right)):
        packed = weights[name]
        assert packed.codes.shape == tensor.shape
        assert float((packed.unpack() - tensor).abs().max()) <= float(packed.scales.max()) * 0.51
    assert weights["right"].axis == 1
    assert quantized.coverage is not None
    assert (quantized.coverage.macs, quantized.coverage.weights) == (1.0, 1.0)
    floats = [n for n, p in quantized.module.named_parameters() if p.is_floating_point() and p.dim() > 1]
    assert floats == []  # no float weight is left beside its codes
    ids = torch.randint(0, 40, (5, 6))
    with torch.no_grad():
        a, b = quantized.module(ids).flatten(), net(ids).flatten()
    assert float(torch.cosine_similarity(a, b, 0)) > 0.999
    assert not torch.equal(a, b)


def test_neither_the_program_nor_its_weights_change() -> None:
    net, inputs = deploy_nets.made("vision")
    before = {n: t.clone() for n, t in net.state_dict().items()}
    program = capture(net, inputs(2), train=False)
    graph = str(program.eval_graph.graph)
    quantize(program, scheme="w4")
    assert str(program.eval_graph.graph) == graph
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


def test_what_is_covered_and_what_stays_float() -> None:
    net, inputs = deploy_nets.made("vision")
    quantized = quantize(capture(net, inputs(2), train=False), scheme="int8-dynamic")
    tokens, width = 17, 16
    linears = tokens * (48 * width + width * width + 32 * width + 32 * width) + 5 * width
    attention, patches = 2 * tokens * tokens * width, 16 * (16 * 3 * 16)
    assert quantized.coverage is not None
    assert quantized.coverage.macs == pytest.approx(linears / (linears + attention + patches), abs=1e-9)
    matrices = 48 * 16 + 16 * 16 + 32 * 16 * 2 + 5 * 16
    assert quantized.coverage.weights == pytest.approx(matrices / (matrices + 16 * 3 * 16 + 16 + 17 * 16), abs=1e-9)
    notes = "\n".join(quantized.notes)
    for words in ("conv2d stays float (1×", "ConvInteger", "scaled_dot_product_attention stays float", "activations"):
        assert words in notes
    assert f"{quantized.coverage.macs:.1%} of the MACs" in notes


class Gru(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.GRU) -> None:
        super().__init__()
        self.body, self.head = kind(8, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


@pytest.mark.parametrize(("kind", "scheme"), [(nn.GRU, "int8-dynamic"), (nn.GRU, "w4"), (nn.LSTM, "w4")])
def test_recurrent_layers_without_a_kernel_are_listed(kind: type[nn.RNNBase], scheme: str) -> None:
    quantized = quantize(made(Gru(kind), 2, 5, 8), scheme=scheme)
    assert list(quantized.weights) == ["head.weight"]
    assert any(n.startswith(f"{kind.__name__.lower()} stays float (1×") for n in quantized.notes)
    assert quantized.coverage is not None
    assert 0 < quantized.coverage.macs < 0.02


@pytest.mark.parametrize("scheme", ["int8-dynamic", "w4"])
def test_a_network_without_a_covered_layer_is_refused_with_the_reasons(scheme: str) -> None:
    with pytest.raises(NothingToDo, match="conv2d stays float"):
        quantize(made(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), 2, 3, 8, 8), scheme=scheme)


def test_groups_that_do_not_divide_the_inputs_are_noted() -> None:
    quantized = quantize(made(nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 3)), 2, 64), scheme="w4")
    noted = [n for n in quantized.notes if "no multiple of 32" in n]
    assert len(noted) == 1
    assert noted[0].startswith("2.weight: 40 inputs")
    assert tuple(quantized.weights["2.weight"].scales.shape) == (3, 2)


def test_options_that_do_not_apply_are_refused() -> None:
    program = made(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), 2, 8)
    with pytest.raises(UsageError, match="repair must be empty"):
        quantize(program, scheme="w4", repair=["gptq"])
    with pytest.raises(UsageError, match="must be given calibrate"):
        quantize(program, scheme="int8")
    with pytest.raises(UsageError, match="target must be"):
        quantize(program, scheme="w4", target="tpu")
    unread = quantize(program, scheme="int8-dynamic", calibrate=[torch.randn(4, 8)])
    assert any("reads no samples" in n for n in unread.notes)


def test_layers_that_are_asked_for_stay_float() -> None:
    program = made(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)), 2, 32)
    quantized = quantize(program, scheme="w4", float_layers=["0", "4.weight"])
    assert list(quantized.weights) == ["2.weight"]
    assert any(n.startswith("linear stays float (2×") and n.endswith("asked for") for n in quantized.notes)
    with pytest.raises(UsageError, match="matches none"):
        quantize(program, scheme="w4", float_layers=["9.*"])
    with pytest.raises(UsageError, match="weights 'channel'"):
        quantize(program, scheme="w4", weights="tensor")
