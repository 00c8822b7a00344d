from __future__ import annotations

import subprocess
import sys

import pytest

from paredown.errors import UsageError
from paredown.target import TARGETS, named

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


def test_other_names_are_refused() -> None:
    with pytest.raises(UsageError, match="must be one of onnxruntime-x86, onnxruntime-arm"):
        named("onnxruntime-x87")


def test_tables_load_no_torch() -> None:
    code = "import sys, paredown.target; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )
