from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from paredown.errors import UsageError
from paredown.target import TARGETS, named, why_float

KINDS = {"weighted", "binary", "lookup", "shared", "matmul"}


def test_every_entry_is_an_aten_op_of_a_known_kind() -> None:
    import torch

    for target in TARGETS.values():
        assert set(target.ops.values()) <= KINDS
        for name in (*target.ops, *target.fusions, *target.decompositions):
            assert hasattr(torch.ops.aten, name), name
        assert not set(target.fusions) & set(target.ops)


def test_every_decomposition_has_its_rewrite() -> None:
    from paredown.quantize.decompose import REWRITES

    for target in TARGETS.values():
        assert set(target.decompositions) <= set(REWRITES)


def test_ops_that_are_rewritten_away_are_not_annotated_by_mistake() -> None:
    target = TARGETS["onnxruntime-x86"]
    assert target.ops["linear"] == "weighted"  # only its form with tokens is rewritten
    assert not {"hardswish", "silu", "mean", "dropout"} & set(target.ops)
    assert not {"softmax", "gelu", "layer_norm", "scaled_dot_product_attention", "matmul"} & set(target.ops)


def test_what_saturates_on_x86_alone_binds_no_weight_on_arm() -> None:
    arm, x86 = (TARGETS[f"onnxruntime-{name}"] for name in ("arm", "x86"))
    assert (arm.pair_sum, x86.pair_sum) == (None, 128)
    assert arm.ops == x86.ops and arm.activation_dtype == x86.activation_dtype, "the same kernels by name"


def test_a_model_for_arm_is_not_narrowed() -> None:
    """Two large neighbours: for x86 their scale grows so that they add up to 128 at most, for ARM each keeps all its codes."""
    pytest.importorskip("torchao")
    import torch

    from paredown.program import capture
    from paredown.quantize import quantize
    from paredown.quantize.pairs import pair_sums

    net = torch.nn.Sequential(torch.nn.Linear(8, 4))
    torch.nn.init.constant_(net[0].weight, 0.9)
    program = capture(net, torch.zeros(2, 8), train=False)
    made = {
        name: quantize(program, target=f"onnxruntime-{name}", calibrate=[torch.randn(32, 8)]).weights["0.weight"]
        for name in ("x86", "arm")
    }
    assert int(pair_sums(made["x86"].codes).max()) <= 128
    assert made["arm"].codes.unique().tolist() == [127]
    assert float(made["arm"].scales[0]) == pytest.approx(0.9 / 127)
    assert float(made["x86"].scales[0]) > 1.9 * float(made["arm"].scales[0])


def test_a_file_for_arm_says_how_it_is_timed_here(tmp_path: Path) -> None:
    """Its check and its timings are of exact products, which a session without the option does not have on every x86."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pytest.importorskip("torchao")
    import torch

    import paredown
    from paredown.measure import measure

    net = torch.nn.Sequential(torch.nn.Linear(8, 4))
    torch.nn.init.constant_(net[0].weight, 0.9)
    program, x = paredown.capture(net, torch.zeros(2, 8), train=False), torch.randn(32, 8)
    for name, told in (("arm", True), ("x86", False)):
        target = f"onnxruntime-{name}"
        made = paredown.quantize(program, target=target, calibrate=[x])
        artifact = paredown.export(made, tmp_path / f"{name}.onnx", target=target)
        checked = paredown.check(artifact, made, [x])
        timed = measure(artifact, [x], runs=5, seconds=0.1)["latency_ms"]
        for said in (" ".join(checked.notes), timed.protocol):
            assert ("exact 8-bit products" in said, "nothing ran there" in said) == (told, told)


@pytest.mark.parametrize("name", list(TARGETS))
def test_what_has_no_kernel_has_a_reason(name: str) -> None:
    target = named(name)
    for op in (
        "softmax",
        "Softmax",
        "layer_norm",
        "MVN",
        "scaled_dot_product_attention",
        "conv_transpose2d",
        "gelu",
        "what_is_this",
    ):
        said = why_float(target, op)
        assert "{}" not in said and said
    assert why_float(target, "SOFTMAX") == why_float(target, "_softmax"), "whoever names it"
    assert "that the table of targets knows" in why_float(target, "what_is_this")
    assert "between ops in float" in why_float(target, "add"), "it has a kernel"
    assert "asked for by float_layers" in why_float(target, "conv2d")


def test_other_names_are_refused() -> None:
    with pytest.raises(UsageError, match="must be one of onnxruntime-x86, onnxruntime-arm"):
        named("onnxruntime-x87")


def test_tables_load_no_torch() -> None:
    code = "import sys, paredown.target; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )
