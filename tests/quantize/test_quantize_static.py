from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deploy_nets

pytest.importorskip("torchao")

from paredown import program as programs
from paredown.errors import MissingError, RejectedError, UsageError
from paredown.plan import Plan
from paredown.program import GraphModel, capture
from paredown.prune.nouns import Proof, Pruned
from paredown.quantize import Quantized, quantize
from paredown.quantize.decompose import op_name
from paredown.target import TARGETS

OPS = torch.ops.quantized_decomposed


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0))


def pruned(program: programs.Program, module: nn.Module, realiser: str) -> Pruned:
    proof = Proof(max_error=0.0, scale=1.0, moved=1.0, mode="float32")
    return Pruned(module=module, program=program, plan=Plan(keep={}), realiser=realiser, proof=proof)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def residual() -> tuple[nn.Module, programs.Program, Quantized]:
    net, inputs = deploy_nets.made("residual")
    program = capture(net, inputs(2))
    return net, program, quantize(program, calibrate=[inputs(16) for _ in range(4)])


def test_the_simulation_is_close_and_free_in_its_batch(residual: tuple[nn.Module, programs.Program, Quantized]) -> None:
    net, _, quantized = residual
    for batch in (1, 2, 7):
        x = torch.randn(batch, 1, 8, 8)
        with torch.no_grad():
            assert cosine(net(x), quantized.module(x)) > 0.995


def test_codes_are_the_folded_weights_rounded(residual: tuple[nn.Module, programs.Program, Quantized]) -> None:
    net, _, quantized = residual
    names = {"stem.weight", "head.weight", *(f"blocks.{i}.{c}.weight" for i in (0, 1) for c in "ac")}
    assert set(quantized.weights) == names
    w = net.stem.weight.detach().double().numpy()  # batch norm folded by hand, in numpy
    gain = net.norm.weight.detach().double().numpy() / np.sqrt(net.norm.running_var.double().numpy() + net.norm.eps)
    folded = w * gain[:, None, None, None]
    wider = []
    for name, w in (("stem.weight", folded), ("head.weight", net.head.weight.detach().double().numpy())):
        packed = quantized.weights[name]
        rows = w.reshape(len(w), -1)  # one channel or none behind the inputs: neighbours are neighbours of the row
        rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
        both = np.abs(rows[:, ::2] + rows[:, 1::2]).max(1)
        scales = np.maximum(np.abs(rows).max(1), both) / 127  # two products must fit in 16 bits
        assert packed.codes.dtype == torch.int8
        np.testing.assert_allclose(packed.scales.numpy(), scales, rtol=1e-5)
        places = w / scales.reshape(-1, *[1] * (w.ndim - 1))
        assert np.abs(packed.codes.numpy() - places).max() <= 0.5001
        wider.append(both > np.abs(rows).max(1))
    assert 0 < np.concatenate(wider).mean() < 1  # both parts of the rule were needed
    assert all(int(p.codes.min()) >= -127 for p in quantized.weights.values())


def test_both_realisers_give_the_same_codes(residual: tuple[nn.Module, programs.Program, Quantized]) -> None:
    net, program, _ = residual
    inputs = deploy_nets.NETS["residual"][1]
    torch.manual_seed(0)
    batches = [inputs(16) for _ in range(2)]
    graph = GraphModel(program.eval_graph, program.train_graph, program.state)
    by_class = quantize(pruned(program, net, "module"), calibrate=batches)
    by_graph = quantize(pruned(program, graph.eval(), "graph"), calibrate=lambda: iter(batches))
    assert set(by_class.weights) == set(by_graph.weights)
    for name, packed in by_class.weights.items():
        assert torch.equal(packed.codes, by_graph.weights[name].codes)
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(by_class.module(x), by_graph.module(x))


def test_nothing_that_came_in_changes() -> None:
    net, inputs = deploy_nets.made("residual")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    program = capture(net, inputs(2), train=False)
    quantize(pruned(program, net.train(), "module"), calibrate=[inputs(8)])
    assert net.training
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert all(torch.equal(v, program.state[k]) for k, v in before.items())


def sources(node: torch.fx.Node) -> list[torch.fx.Node]:
    return [x for x in node.all_input_nodes if x.op != "get_attr"]


def scale_of(node: torch.fx.Node) -> tuple[object, object]:
    assert node.target in (OPS.quantize_per_tensor.default, OPS.dequantize_per_tensor.default), node
    return node.args[1], node.args[2]


def quantized_net(name: str) -> Quantized:
    net, inputs = deploy_nets.made(name)
    return quantize(capture(net, inputs(2), train=False), calibrate=[inputs(16) for _ in range(2)])


def test_both_inputs_of_an_addition_are_quantized_and_relu_comes_before_quantize() -> None:
    graph = quantized_net("residual").module.graph
    adds = [n for n in graph.nodes if op_name(n) == "add"]
    assert len(adds) == 2
    for add in adds:
        assert all(x.target is OPS.dequantize_per_tensor.default for x in sources(add))
        assert [op_name(u) for u in add.users] == ["relu"]
    relus = [n for n in graph.nodes if op_name(n) == "relu"]
    assert len(relus) == 5
    assert all(u.target is OPS.quantize_per_tensor.default for r in relus for u in r.users)


def test_option_a_shortcut_pool_and_flatten_share_one_scale() -> None:
    graph = quantized_net("residual").module.graph
    moved = [n for n in graph.nodes if op_name(n) in ("slice", "pad", "adaptive_avg_pool2d", "flatten")]
    assert {op_name(n) for n in moved} == {"slice", "pad", "adaptive_avg_pool2d", "flatten"}
    for node in moved:
        readers = [u for u in node.users if u.target is OPS.quantize_per_tensor.default]
        assert len(readers) == len(node.users) == 1
        assert scale_of(sources(node)[0]) == scale_of(readers[0])


def test_inputs_of_a_concatenation_share_one_scale() -> None:
    graph = quantized_net("concat").module.graph
    cat = next(n for n in graph.nodes if op_name(n) == "cat")
    scales = {scale_of(x) for x in sources(cat)} | {scale_of(u) for u in cat.users}
    assert len(scales) == 1


def test_activations_are_uint8_and_compound_activations_are_taken_apart() -> None:
    quantized = quantized_net("mobile")
    nodes = list(quantized.module.graph.nodes)
    quantizers = [n for n in nodes if n.target is OPS.quantize_per_tensor.default]
    assert quantizers
    assert {n.args[3:6] for n in quantizers} == {(0, 255, torch.uint8)}
    names = [op_name(n) for n in nodes]
    assert not {"hardswish", "silu", "batch_norm", "mean"} & set(names)
    assert names.count("mul") == 3
    gate = next(n for n in nodes if op_name(n) == "hardsigmoid")
    assert scale_of(next(iter(gate.users))) == (1 / 256, 0)  # what its int8 form needs
    assert not any("hardsigmoid" in note for note in quantized.notes)


def test_attention_stays_float_and_is_reported() -> None:
    quantized = quantized_net("vision")
    nodes = list(quantized.module.graph.nodes)
    attention = next(n for n in nodes if op_name(n) == "scaled_dot_product_attention")
    assert not any("stays float" in n and "linear" in n for n in quantized.notes)
    assert any(n.startswith("scaled_dot_product_attention stays float (1×") for n in quantized.notes)
    assert {"token", "position", "patches.weight", "qkv.weight", "head.weight"} <= set(quantized.weights)
    assert attention.users


def test_the_annotation_reads_nothing_but_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TARGETS["onnxruntime-x86"]
    fewer = dataclasses.replace(table, ops={k: v for k, v in table.ops.items() if k != "linear"})
    monkeypatch.setitem(TARGETS, "onnxruntime-x86", fewer)  # type: ignore[arg-type]
    quantized = quantized_net("residual")
    assert "head.weight" not in quantized.weights
    assert "stem.weight" in quantized.weights
    assert any(n.startswith("linear stays float (1×") for n in quantized.notes)
    products = dataclasses.replace(table, ops={**table.ops, "matmul": "matmul"})
    monkeypatch.setitem(TARGETS, "onnxruntime-x86", products)  # type: ignore[arg-type]

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 3)  # without a weight in codes nothing would be quantized

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x @ x.transpose(1, 2))

    small = quantize(capture(Product(), torch.randn(2, 3, 4), train=False), calibrate=[torch.randn(32, 3, 4)])
    product = next(n for n in small.module.graph.nodes if op_name(n) == "matmul")
    assert all(x.target is OPS.dequantize_per_tensor.default for x in sources(product))


class Twice(nn.Module):
    """One convolution read twice, followed by batch norm in one place only; its weight is tied to another one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4)
        self.b.weight = self.a.weight
        self.norm.running_var.fill_(4.0)
        self.norm.running_mean.fill_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.norm(y) + y + self.norm(self.b(x)) + self.norm(x)


def test_batch_norm_is_folded_only_where_that_is_right() -> None:
    torch.manual_seed(0)
    net = Twice().eval()
    x = torch.randn(64, 4, 6, 6)
    quantized = quantize(capture(net, torch.randn(2, 4, 6, 6), train=False), calibrate=[x])
    assert "batch_norm" not in {op_name(n) for n in quantized.module.graph.nodes}
    with torch.no_grad():
        assert cosine(net(x), quantized.module(x)) > 0.999
    assert not [n for n in quantized.notes if "stays float" in n]


def test_a_dead_channel_with_a_large_bias_survives() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    with torch.no_grad():
        net[0].weight[0].mul_(1e-14)
        net[0].bias.copy_(torch.tensor([50.0, 0.1, -0.1]))
    x = torch.rand(64, 1, 6, 6)
    quantized = quantize(capture(net, x[:2], train=False), calibrate=[x])
    packed, scale = quantized.weights["0.weight"], 1.0 / 255
    assert abs(50.0 / (float(packed.scales[0]) * scale)) < 2**31
    with torch.no_grad():
        assert float((quantized.module(x) - net(x)).abs().max()) < 0.2


def test_oddities_of_the_calibration_data_are_noted() -> None:
    net, inputs = deploy_nets.made("residual")
    program = capture(net, inputs(2), train=False)
    x = torch.randn(1, 1, 8, 8)
    notes = quantize(program, calibrate=[x.repeat(5, 1, 1, 1)]).notes
    assert any("only 5 samples" in n for n in notes)
    assert any("identical" in n for n in notes)
    bad = torch.randn(40, 1, 8, 8)
    bad[3, 0, 0, 0] = float("nan")
    bad[5] = 0.25
    notes = quantize(program, calibrate=[bad]).notes
    assert any("1 samples with NaN" in n for n in notes)
    assert any("1 of 39 samples are constant" in n for n in notes)
    assert not [n for n in quantize(program, calibrate=[torch.randn(40, 1, 8, 8)]).notes if "calibration" in n]


class Masked(nn.Module):
    """Tokens and which of them count."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.table(ids) * mask[..., None]).mean(1))


def test_samples_are_told_apart_by_all_their_inputs() -> None:
    """A mask of ones is the same in all samples, and one value everywhere; their tokens are not."""
    ids, ones = torch.randint(50, (40, 6), generator=torch.Generator().manual_seed(0)), torch.ones(40, 6)
    program = capture(Masked(), (ids[:2], ones[:2]))
    assert not [n for n in quantize(program, calibrate=[(ids, ones)]).notes if "calibration" in n]
    notes = quantize(program, calibrate=[(ids[:1].expand(40, 6), ones)]).notes
    assert any("all 40 samples are identical" in n for n in notes) and not any("constant" in n for n in notes)
    notes = quantize(program, calibrate=[(torch.cat([ids[:39], ids[:1]]), ones)]).notes
    assert any("1 of 40 samples are repetitions" in n for n in notes)
    notes = quantize(program, calibrate=[(torch.cat([ids[:39], 7 * torch.ones_like(ids[:1])]), ones)]).notes
    assert any("1 of 40 samples are constant" in n for n in notes)


def test_one_number_per_sample_is_not_called_constant() -> None:
    x = torch.randn(40, 1)
    assert not [
        n for n in quantize(capture(nn.Linear(1, 3), x[:2], train=False), calibrate=[x]).notes if "calibration" in n
    ]


def test_num_samples_limits_what_is_read() -> None:
    net, inputs = deploy_nets.made("residual")
    taken = []

    def batches() -> object:
        for _ in range(100):
            taken.append(8)
            yield torch.randn(8, 1, 8, 8)

    notes = quantize(capture(net, inputs(2), train=False), calibrate=batches, num_samples=20).notes  # type: ignore[arg-type]
    assert len(taken) == 3
    assert any("only 20 samples" in n for n in notes)


@pytest.mark.parametrize("nothing", [[], list, [torch.zeros(0, 1, 8, 8)], [torch.full((4, 1, 8, 8), float("nan"))]])
def test_no_samples_is_refused_before_anything_is_written(nothing: object) -> None:
    net, inputs = deploy_nets.made("residual")
    with pytest.raises(RejectedError, match="at least one sample"):
        quantize(capture(net, inputs(2), train=False), calibrate=nothing)  # type: ignore[arg-type]


def test_wrong_requests_say_what_is_right(residual: tuple[nn.Module, programs.Program, Quantized]) -> None:
    net, program, quantized = residual
    x = [torch.randn(4, 1, 8, 8)]
    with pytest.raises(UsageError, match="target must be one of"):
        quantize(program, calibrate=x, target="tflite")
    with pytest.raises(UsageError, match=r"fp32.*cannot produce it yet"):
        quantize(program, calibrate=x, scheme="fp32")
    with pytest.raises(UsageError, match="bits must be integers from 1 to 8"):
        quantize(program, calibrate=x, bits={"head.weight": 9})
    with pytest.raises(UsageError, match=r"bits must match.*'nothing'"):
        quantize(program, calibrate=x, bits={"nothing": 4})
    with pytest.raises(UsageError, match="observer must be"):
        quantize(program, calibrate=x, observer="median")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="num_samples"):
        quantize(program, calibrate=x, num_samples=0)
    with pytest.raises(UsageError, match="Pruned or a Program"):
        quantize(net, calibrate=x)  # type: ignore[arg-type]
    with pytest.raises(RejectedError, match="int8 already"):
        quantize(quantized, calibrate=x)  # type: ignore[arg-type]
    with pytest.raises(RejectedError, match="must fit the network"):
        quantize(program, calibrate=[torch.randn(4, 2, 8, 8)])
    with pytest.raises(RejectedError, match="a batch must be"):
        quantize(program, calibrate=["images"])


def test_a_network_that_is_quantized_already_is_recognised(
    residual: tuple[nn.Module, programs.Program, Quantized],
) -> None:
    _, program, quantized = residual

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = [quantized.module]

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[0](x)

    with pytest.raises(RejectedError, match="must be in float"):
        quantize(pruned(program, Inside(), "module"), calibrate=[torch.randn(4, 1, 8, 8)])


def test_missing_torchao_names_the_extra(
    residual: tuple[nn.Module, programs.Program, Quantized], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantize_pt2e", None)
    with pytest.raises(MissingError, match=r"paredown\[quant\]"):
        quantize(residual[1], calibrate=[torch.randn(4, 1, 8, 8)])


def test_named_inputs_and_structured_outputs() -> None:
    net, inputs = deploy_nets.made("named")
    quantized = quantize(capture(net, inputs(2), train=False), calibrate=[inputs(32)])
    batch = inputs(3)
    with torch.no_grad():
        expected, got = net(*batch["args"], **batch["kwargs"]), quantized.module(*batch["args"], **batch["kwargs"])
    assert list(got) == ["kind", "rest"]
    assert isinstance(got["rest"], tuple)
    assert cosine(expected["kind"], got["kind"]) > 0.99
    assert cosine(expected["rest"][1], got["rest"][1]) > 0.99
