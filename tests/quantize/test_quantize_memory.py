"""The memory of repairs: estimated before they are done, beside what they really take, and refused where there is less."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("torchao")

from paredown import machine_memory
from paredown.errors import ResourceError
from paredown.machine_memory import available_bytes
from paredown.program import Program, capture
from paredown.quantize import quantize
from paredown.quantize.memory import Estimate
from paredown.quantize.static import calibrated


class Block(nn.Module):
    """A shortcut: its input is alive until the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.relu(self.a(x)))


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program() -> Program:
    return captured()


def captured() -> Program:
    torch.manual_seed(0)
    return capture(nn.Sequential(Block(), nn.ReLU(), Block()).eval(), torch.randn(2, 8, 32, 32))


def test_the_estimate_counts_what_is_alive_at_once(program: Program) -> None:
    """By hand: x, conv a, its ReLU (the input of a shortcut is a value of its own from the second block on), float32, 32 × 32."""
    base = calibrated(program, target="onnxruntime-x86", calibrate=[torch.randn(4, 8, 32, 32)])
    call = ((torch.randn(4, 8, 32, 32),), {})
    pixel = 4 * 32 * 32
    found = Estimate(base.prepared, call, ["bias"], None)
    assert (
        found.sample_bytes == 3 * 8 * pixel + 2 * (8 + 16 + 16) * pixel
    )  # 3 × input, 2 lanes × (shortcut, conv, ReLU)
    assert found.bytes_for(10) == 10 * found.sample_bytes
    assert Estimate(base.prepared, call, ["equalize"], None).sample_bytes == 8 * pixel
    rounding = Estimate(base.prepared, call, ["gptq"], None)
    assert rounding.fixed_bytes == 8 * (4 * 144**2 + 8 * 144)  # conv b reads 16 channels × 9
    assert "some 3.41 MB" in Estimate(base.prepared, call, ["bias"], None).told(8)


TAKEN = """
import re, sys
from pathlib import Path
import torch
from paredown.quantize import quantize
from tests.quantize.test_quantize_memory import captured

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

repair = sys.argv[1]
program = captured()
batches = [torch.randn(16, 8, 32, 32) for _ in range(24)]
quantize(program, calibrate=batches[:2], repair=[repair])  # what is loaded and set up once
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
notes = quantize(program, calibrate=batches, repair=[repair]).notes
print(status("VmHWM") - before)
print(next(n for n in notes if n.startswith("memory: some")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the process from /proc")
@pytest.mark.parametrize("repair", ["bias", "gptq"])
def test_the_estimate_is_near_what_is_taken(repair: str) -> None:
    """In a process of its own: where other tests ran before, what they gave back is taken again and no peak shows."""
    done = subprocess.run(
        [sys.executable, "-c", TAKEN, repair], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "clear_refs" in done.stderr:
        pytest.skip("the peak cannot be set back here")
    assert done.returncode == 0, done.stderr
    taken, told = done.stdout.strip().splitlines()[-2:]
    estimated = 1e6 * float(re.search(r"some ([\d.]+) MB", told)[1])  # type: ignore[index]
    assert "(estimated)" in told and "384 samples" in told
    assert 0.5 * estimated < int(taken) < 1.6 * estimated, (taken, estimated)


def test_more_samples_than_memory_are_refused_before_the_repair(program: Program) -> None:
    batch = torch.randn(2, 8, 32, 32)
    free = available_bytes()
    if free is None:
        pytest.skip("the system does not say how much memory is free")
    many = [batch] * (free // (2 * 200_000))
    with pytest.raises(
        ResourceError, match=r"must fit in memory.*estimated.*Take at most [\d,]+ samples .*leave out gptq"
    ) as caught:
        quantize(program, calibrate=many, repair=["gptq"])
    most = int(re.search(r"at most ([\d,]+) samples", str(caught.value))[1].replace(",", ""))  # type: ignore[index]
    assert 0 < most < 2 * len(many)
    quantize(program, calibrate=many[:16], repair=["gptq"], num_samples=32)
    with pytest.raises(ResourceError, match="Got some"):
        quantize(program, calibrate=many, repair=["gptq"], num_samples=most + most // 2)
    assert quantize(program, calibrate=many, num_samples=8).notes is not None  # nothing is kept without a repair
    assert ResourceError.exit_code == 7


def test_files_that_a_control_group_has_read_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that has read its data leaves most of a container's limit to pages of files, which give way."""
    monkeypatch.setattr(machine_memory, "_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text(
        "anon 200000\nfile 700000\nshmem 0\ninactive_file 100000\nactive_file 600000\n"
    )
    assert available_bytes() == 800_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() != 800_000
