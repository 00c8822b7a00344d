"""A network of `deploy_nets` with its float and its int8 file for one target: what the export tests of every runtime start from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

import deploy_nets
from paredown.export import Artifact, export
from paredown.program import Program, capture
from paredown.quantize import Quantized, quantize


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    net: nn.Module
    program: Program
    quantized: Quantized
    fp32: Artifact
    int8: Artifact

    def samples(self, batch: int = 5) -> list[dict[str, object]]:
        torch.manual_seed(99)
        return [deploy_nets.NETS[self.name][1](batch)]


def case_of(name: str, folder: Path, target: str, suffix: str) -> Case:
    net, inputs = deploy_nets.made(name)
    program = capture(net, inputs(2), train=False)
    quantized = quantize(program, calibrate=[inputs(16) for _ in range(4)], target=target)
    return Case(
        name=name,
        net=net,
        program=program,
        quantized=quantized,
        fp32=export(program, folder / f"a{suffix}", target=target),
        int8=export(quantized, folder / f"b{suffix}"),
    )
