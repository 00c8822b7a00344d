from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deploy_nets

pytest.importorskip("torchao")

from paredown.errors import UsageError
from paredown.export import check, export, predictor
from paredown.plan import Mask, Plan
from paredown.program import Program, capture
from paredown.prune import prune
from paredown.quantize import quantize
from paredown.quantize.decompose import fetch
from paredown.quantize.observe import MinMax, PerChannel, PerChannelOneScale
from paredown.quantize.qat import LearnedStep, Rehearsal, learnable, train_quantized
from paredown.quantize.static import calibrated


def observer(values: Tensor, low: int = 0, high: int = 15) -> LearnedStep:
    seen = MinMax(dtype=torch.uint8, quant_min=low, quant_max=high, qscheme=torch.per_tensor_affine)
    seen(values)
    return LearnedStep(seen)


def test_gradients_are_those_of_the_paper() -> None:
    x = torch.tensor([[-1.0, 0.26, 0.52, 1.31, 9.0]], requires_grad=True)
    step = observer(torch.tensor([0.0, 3.0]))  # s = 0.2, z = 0, codes 0 … 15
    out = step(x)
    assert torch.allclose(
        out, torch.tensor([[0.0, 0.2, 0.6, 1.4, 3.0]])
    )  # by hand: 1.3 and 2.6 steps, 6.55 rounds to 7
    out.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]
    inside = (1 - 1.3) + (3 - 2.6) + (7 - 6.55)  # round(v) - v
    expected = (0 + inside + 15) / np.sqrt(5 * 15)  # times g = 1 / √(N · qmax)
    assert step.scale.grad is not None and float(step.scale.grad) == pytest.approx(expected, rel=1e-4)


def test_weights_have_one_step_per_channel_and_masked_ones_no_gradient() -> None:
    weight = torch.tensor([[0.53, -1.0, 0.2], [4.3, 2.1, -8.0]], requires_grad=True)
    seen = PerChannel(dtype=torch.int8, qscheme=torch.per_channel_symmetric, ch_axis=0, quant_min=-8, quant_max=7)
    seen(weight)
    keep = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    step = LearnedStep(seen, keep)
    out = step(weight)
    out.sum().backward()
    assert out[0, 1] == 0 and weight.grad is not None and weight.grad[0, 1] == 0
    assert step.scale.shape == (2,) and step.scale.grad is not None and bool((step.scale.grad != 0).all())


def test_a_weight_with_one_scale_has_one_step() -> None:
    weight = torch.tensor([[0.53, -1.0, 0.2], [4.3, 2.1, -8.0]], requires_grad=True)
    spec: dict[str, Any] = {"dtype": torch.int8, "qscheme": torch.per_channel_symmetric, "ch_axis": 0}
    seen = PerChannelOneScale(quant_min=-8, quant_max=7, **spec)
    seen(weight)
    step = LearnedStep(seen)
    (step(weight) * torch.tensor([[1.0], [3.0]])).sum().backward()
    single = float(step.scale.detach())
    places = weight.detach().double() / single
    inside = (places == places.clamp(-8, 7)).double()
    pull = (places.round().clamp(-8, 7) - places * inside) * torch.tensor([[1.0], [3.0]])
    assert step.scale.shape == () and step.scale.grad is not None
    assert float(step.scale.grad) == pytest.approx(float(pull.sum()) / np.sqrt(6 * 7), rel=1e-5)  # N: the whole weight
    with torch.no_grad():
        step.scale.mul_(1.1)
    scales, zeros = step.calculate_qparams()
    assert scales.tolist() == pytest.approx([single * 1.1] * 2) and zeros.tolist() == [0, 0]


def test_weights_with_one_scale_keep_one_in_training() -> None:
    _, data, _, _ = task()
    options: dict[str, Any] = {"calibrate": [a for a, _ in data], "scheme": "w4a8", "weights": "tensor"}
    plain = quantize(captured(), **options)
    trained = train_quantized(captured(), lambda: data, step=step, epochs=1, lr=0.05, **options)
    moved = [n for n, p in trained.weights.items() if not torch.equal(p.scales, plain.weights[n].scales)]
    assert moved  # steps were trained
    assert all(len(set(p.scales.tolist())) == 1 for p in trained.weights.values())


@functools.cache
def task() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """A small trained network on a task that four bits hurt: which of five prototypes an image is nearest to."""
    torch.manual_seed(0)
    net, _ = deploy_nets.made("residual")
    prototypes = torch.randn(10, 1, 8, 8)
    y = torch.randint(0, 10, (1024,))
    x = prototypes[y] + 1.2 * torch.randn(1024, 1, 8, 8)
    data = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 768, 64)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    net.train()
    for _ in range(6):
        for a, b in data:
            optimizer.zero_grad()
            F.cross_entropy(net(a), b).backward()
            optimizer.step()
    return net.eval(), data, x[768:], y[768:]


@functools.cache
def captured() -> Program:
    net, _, x, _ = task()
    return capture(net, x[:2])


def step(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_training_recovers_what_four_bits_cost_and_the_codes_are_those_trained() -> None:
    net, data, x, y = task()
    program, images = captured(), [a for a, _ in data]
    before = {n: t.clone() for n, t in net.state_dict().items()}
    options: dict[str, Any] = {"calibrate": images, "scheme": "w4a4"}
    plain = quantize(program, **options)
    trained = train_quantized(program, lambda: data, step=step, epochs=6, lr=0.01, teacher=net, **options)

    def loss(quantized: Any) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(quantized.module(x), y))

    with torch.no_grad():
        dense = float(F.cross_entropy(net(x), y))
    assert loss(plain) > dense + 0.05  # there is something to recover
    assert loss(trained) < dense + 0.5 * (loss(plain) - dense)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    bits = {n: p.bits for n, p in trained.weights.items() if p.axis is not None}
    assert bits.pop("stem.weight") == 8 and bits.pop("head.weight") == 8 and set(bits.values()) == {4}


def test_what_was_trained_is_what_is_converted() -> None:
    _, data, x, _ = task()
    program, images = captured(), [a for a, _ in data]
    seen: dict[str, Any] = {}

    def spy(model: nn.Module, batch: Any) -> Tensor:
        seen["model"] = model
        return step(model, batch)

    trained = train_quantized(program, lambda: data, step=spy, epochs=1, lr=0.01, calibrate=images, scheme="w4a8")
    rehearsal = seen["model"]
    assert isinstance(rehearsal, Rehearsal)
    with torch.no_grad():
        rehearsed, converted = rehearsal(x), trained.module(x)
    assert float((rehearsed - converted).abs().max()) <= 0.02 * float(
        converted.abs().max()
    )  # a step of rounding at most
    steps = {n: m for n, m in rehearsal.graph.named_modules() if isinstance(m, LearnedStep) and m.scale.dim()}
    assert len(steps) == len(trained.weights) == 6
    for m in steps.values():
        scales, _ = m.calculate_qparams()
        assert any(torch.equal(p.scales, scales) for p in trained.weights.values())
    for name, weight in rehearsal.graph.named_parameters():
        packed = trained.weights.get(name)
        if packed is not None:
            wanted = torch.round(weight / packed.scales.reshape(-1, *[1] * (weight.dim() - 1)))
            assert torch.equal(packed.codes.float(), wanted.clamp(-8, 7))


def test_masks_stay(tmp_path: Any) -> None:
    net, data, x, _ = task()
    kept = np.ones(tuple(net.get_parameter("blocks.1.c.weight").shape), dtype=bool)
    kept[::2] = False
    kept[1::2, 3] = False
    small = prune(captured(), Plan(keep={}, masks={"blocks.1.c.weight": Mask.of(kept, "element")}))
    trained = train_quantized(small, lambda: data, step=step, epochs=1, lr=0.02, calibrate=[a for a, _ in data])
    codes = trained.weights["blocks.1.c.weight"].codes.numpy()
    assert not codes[~kept].any() and (codes[kept] != 0).mean() > 0.9
    checked = check(export(trained, tmp_path / "net.onnx"), trained, [x[:8]])
    assert checked.holds


@pytest.mark.parametrize("float_layers", [(), ("head.weight",)], ids=["bias", "bias and a weight in float"])
def test_masks_of_what_is_not_rounded_stay(float_layers: tuple[str, ...]) -> None:
    """Also of a bias; that of a bias into which a batch norm was folded says nothing of what it is then."""
    _, data, _, _ = task()
    masks = {"head.bias": Mask.of(np.arange(10) % 3 != 0, "element")}
    if float_layers:
        masks["head.weight"] = Mask.of(np.arange(160).reshape(10, 16) % 5 != 0, "element")
    small = prune(captured(), Plan(keep={}, masks=masks))
    images = [a for a, _ in data]
    options: dict[str, Any] = {"step": step, "epochs": 1, "lr": 0.02, "calibrate": images, "float_layers": float_layers}
    trained = train_quantized(small, lambda: data, **options)
    left = {n: p.detach().numpy() for n, p in trained.module.named_parameters()}
    for name, mask in masks.items():
        assert not left[name][~mask.kept].any() and left[name][mask.kept].all(), name
    assert not np.array_equal(left["head.bias"], small.module.get_parameter("head.bias").detach().numpy())


def test_steps_rest_at_the_end_and_zero_epochs_change_nothing() -> None:
    _, data, _, _ = task()
    program, images = captured(), [a for a, _ in data]
    steps: list[float] = []

    def spy(model: nn.Module, batch: Any) -> Tensor:
        steps.append(float(next(m for m in model.modules() if isinstance(m, LearnedStep)).scale.sum()))
        return step(model, batch)

    train_quantized(program, lambda: data, step=spy, epochs=2, lr=0.02, calibrate=images)
    assert len(set(steps[:18])) > 9 and len(set(steps[19:])) == 1
    idle = train_quantized(program, lambda: data, step=step, epochs=0, calibrate=images)
    plain = quantize(program, calibrate=images)
    assert all(torch.equal(idle.weights[n].codes, p.codes) for n, p in plain.weights.items())


def test_learnable_leaves_its_base_alone() -> None:
    _, data, x, _ = task()
    base = calibrated(captured(), target="onnxruntime-x86", calibrate=[a for a, _ in data])
    with torch.no_grad():
        before = base.prepared(x)
        rounded = learnable(base, {})(x)
        assert torch.equal(base.prepared(x), before) and not torch.equal(rounded, before)
    assert not any(isinstance(m, LearnedStep) for m in base.prepared.modules())


@pytest.mark.parametrize("target", ["onnxruntime-x86", "onnxruntime-arm"])
def test_four_bit_activations_run_in_kernels_of_eight_bits_on_the_trained_codes(tmp_path: Any, target: str) -> None:
    _, data, x, _ = task()
    images = [a for a, _ in data[:2]]
    options: dict[str, Any] = {"calibrate": images, "scheme": "w4a4", "target": target}
    trained = train_quantized(captured(), lambda: data[:2], step=step, epochs=1, lr=0.01, **options)
    file = export(trained, tmp_path / "net.onnx")
    found = check(file, trained, images)
    assert (
        found.cosine > 0.99999 and found.num_layers == found.num_layers_on_codes
    )  # nothing but the order of sums differs
    assert any("kernels of 8 bits" in n for n in trained.notes)
    twice = predictor(file)(2 * x[:8])  # beyond the ranges of the calibration: codes must stop at 15, not at 255
    with torch.no_grad():
        expected = trained.module(2 * x[:8])
    assert float((twice - expected).abs().max()) <= 1e-3 * float(expected.abs().max())


def test_biases_of_four_bit_layers_are_whole_steps_and_the_float_network_keeps_its_own() -> None:
    net, data, _, _ = task()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    quantized = quantize(captured(), calibrate=[a for a, _ in data[:2]], scheme="w4a4")
    wholes = 0
    for node in quantized.module.graph.nodes:
        if str(node.target) not in ("aten.conv2d.default", "aten.linear.default") or len(node.args) < 3:
            continue
        scales = getattr(quantized.module, str(node.args[1].args[1].target)).double() * node.args[0].args[1]
        bias = fetch(quantized.module, str(node.args[2].target)).double()
        assert float((bias / scales - (bias / scales).round()).abs().max()) < 1e-3
        wholes += 1
    assert wholes == len([w for w in quantized.weights.values() if w.axis is not None])
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


@pytest.mark.parametrize("target", ["openvino-x86", "executorch-xnnpack"])
def test_four_bit_activations_have_no_file_for_other_targets(target: str) -> None:
    with pytest.raises(UsageError, match=r"target must be one of onnxruntime-x86, .* for the scheme w4a4"):
        quantize(captured(), target=target, calibrate=[task()[1][0][0]], scheme="w4a4")
