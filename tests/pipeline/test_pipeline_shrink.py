"""What a search for bytes takes for the part of a file that is no codes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from paredown.couple import couple
from paredown.errors import InfeasibleError
from paredown.pipeline.fitted import Shrinking, Weighing, fitted_bits, float_bytes, weighed
from paredown.plan import Plan
from paredown.program import capture
from paredown.prune import prune


def test_float_layers_shrink_with_the_network() -> None:
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    program = capture(net, torch.randn(2, 8))
    coded = ["0.weight", "4.weight"]
    assert float_bytes(program, coded) == 4 * 32 * 16
    keep = {f.parameter: {f.axis: tuple(range(8))} for s in couple(program).spaces[:1] for f in s.footprints}
    small = prune(program, Plan(keep=keep))
    shrinking = Shrinking(limit=10_000, overhead=5_000, widths=(8, 4), float_bytes=float_bytes(program, coded))
    assert shrinking.overhead_of(program, coded) == 5_000
    assert shrinking.overhead_of(small, coded) == 5_000 - 4 * (32 - 8) * 16


def weighing(folder: Path) -> Weighing:
    options = {"target": "onnxruntime-x86", "calibrate": lambda: [torch.randn(16, 8)], "idle_repairs": True}
    return Weighing(options=options, repair=["gptq"], path=folder / "w.onnx", say=print)


def test_what_an_estimate_calls_out_of_reach_is_weighed(tmp_path) -> None:
    program = capture(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), torch.randn(2, 8))
    how = weighing(tmp_path)
    size, known = weighed(program, how.options, tmp_path / "eight.onnx", 1e6, (8,))
    wrong = dataclasses.replace(
        known, limit=float(size), overhead=10.0 * size
    )  # far more beside the codes than there is
    assert fitted_bits(program, wrong, how) == {"0.weight": 8, "2.weight": 8}
    with pytest.raises(
        InfeasibleError, match=rf"must be reachable: {size - 1:,}\. Got {size:,} B in the smallest of 1 files"
    ):
        fitted_bits(program, dataclasses.replace(wrong, limit=float(size - 1)), how)


def test_bits_that_do_not_fit_after_the_training_come_with_the_plan_that_was_carried_out(tmp_path) -> None:
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    program = capture(net, torch.randn(2, 8))
    keep = {f.parameter: {f.axis: tuple(range(8))} for s in couple(program).spaces[:1] for f in s.footprints}
    levels = [{"dense": {"macs": 384}, "reached": {"macs": 200}}, {"dense": {"macs": 200}, "reached": {"macs": 96}}]
    small = prune(program, Plan(keep=keep, made_by={"levels": levels}))
    how = weighing(tmp_path)
    for thing, nearest in ((small, small.plan), (program, None)):
        with pytest.raises(InfeasibleError, match="size_bytes must be reachable: 10") as caught:
            fitted_bits(thing, Shrinking(limit=10, overhead=5, widths=(8,)), how)
        assert (caught.value.nearest is None) is (nearest is None)
        if nearest is not None:
            assert caught.value.nearest.keep == nearest.keep
            assert caught.value.nearest.made_by["dense"] == {"macs": 384}
            assert caught.value.nearest.made_by["reached"] == {"macs": 96}
