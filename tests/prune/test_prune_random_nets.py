"""Random DAGs with random plans: whatever is built, pruned equals the original with the reads zeroed, in float64.

The nets are made of convolutions, residual additions, concatenations, splits, groups, shuffles, transposes, shared
modules and attention over a small feature map. What is expected comes from the user's own class and the definition alone.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hazards import Hazard, conv, healthy, random
from oracle import distance, doubled, plan_of, removed_units, run, scale, within, zeroed
from paredown.couple import couple
from paredown.program import capture
from paredown.prune import prune

Step = tuple[str, int, int, int]
OPS = (
    "conv", "conv", "grouped", "depthwise", "multiplied", "transposed", "norm", "group_norm", "act", "add", "add", "cat", "cat", "split", "chunk",
    "shuffle", "shared", "excite", "pad", "crop", "gate", "pool", "unshuffle", "flip", "stack", "scale", "transpose",
    "transpose", "attention", "shuffle", "shuffle", "grouped", "add", "split", "chunk", "layer_norm",
)  # fmt: skip
ASKED = ("add", "cat", "split", "grouped", "shuffle", "transpose", "transposed", "shared", "attention")
"""Each must occur in nets that lose channels."""


class Attention(nn.Module):
    """Self-attention over the positions of a feature map; with `repeats`, several heads of queries share keys and values."""

    def __init__(self, channels: int, heads: int, width: int, repeats: int) -> None:
        super().__init__()
        self.heads, self.width, self.repeats = heads, width, repeats
        self.q = nn.Linear(channels, heads * width)
        self.k = nn.Linear(channels, heads // repeats * width, bias=False)
        self.v = nn.Linear(channels, heads // repeats * width)
        self.proj = nn.Linear(heads * width, channels)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2)
        q, k, v = (
            p(rows).view(rows.shape[0], rows.shape[1], -1, self.width).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        if self.repeats > 1:
            k, v = (t.repeat_interleave(self.repeats, dim=1) for t in (k, v))
        seen = torch.softmax(q @ k.transpose(-1, -2) * self.width**-0.5, dim=-1) @ v
        out = self.proj(seen.transpose(1, 2).flatten(2))
        return out.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


class Dag(nn.Module):
    """A list of steps over a growing list of feature maps of one spatial size; each step picks its operands by number."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.parts = nn.ModuleDict()
        widths = [3]
        self.program: list[tuple[str, list[int], Any]] = []
        for number, (op, a, b, size) in enumerate(steps):
            self._add(f"{number}", op, a % len(widths), b % len(widths), size, widths)
        for i, width in enumerate(widths[-3:]):
            self.parts[f"out{i}"] = conv(width, 4, 1)
        self.num_outputs = len(widths[-3:])

    def _add(self, name: str, op: str, a: int, b: int, size: int, widths: list[int]) -> None:  # noqa: PLR0912 (a table of ops)
        c = widths[a]
        divisors = [g for g in (2, 3, 4) if c % g == 0]
        made: nn.Module | None = None
        out, inputs, extra = c, [a], None
        if op == "conv":
            out, made = size, conv(c, size)
        elif op == "grouped" and divisors:
            g = divisors[size % len(divisors)]
            out, made = g * (1 + size % 3), conv(c, g * (1 + size % 3), groups=g)
        elif op == "depthwise":
            made = conv(c, c, groups=c)
        elif op == "multiplied" and c <= 6:
            out, made = 2 * c, conv(c, 2 * c, groups=c)
        elif op == "transposed":
            out, made = size, nn.ConvTranspose2d(c, size, 3, padding=1)
        elif op == "norm":
            made = nn.BatchNorm2d(c)
        elif op == "layer_norm":
            made = nn.LayerNorm(c)
        elif op == "transpose":
            out, made = size, nn.Linear(c, size)
        elif op == "attention":
            heads, repeats = ((2, 1), (3, 1), (4, 2))[size % 3]
            made = Attention(c, heads, 2, repeats)
        elif op == "group_norm" and divisors:
            made = nn.GroupNorm(divisors[size % len(divisors)], c)
        elif op == "shared":
            other = [
                n
                for n, m in self.parts.items()
                if isinstance(m, nn.Conv2d) and (m.in_channels, m.out_channels) == (c, c)
            ]
            extra = other[size % len(other)] if other else name
            made = None if other else conv(c, c)
        elif op == "excite":
            made = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(c, 3, 1), nn.ReLU(), conv(3, c, 1), nn.Sigmoid())
        elif op == "gate":
            made = conv(c, 1)
        elif op == "scale":
            made = nn.ParameterList([nn.Parameter(torch.ones(c, 1, 1))])  # type: ignore[assignment]
        elif op in ("add", "stack"):
            inputs = [a, b]
            made = None if widths[a] == widths[b] else conv(widths[b], c, 1)
        elif op == "cat":
            inputs, out = [a, b], c + widths[b]
        elif op == "split" and c > 2:
            extra = 1 + size % (c - 1)
            self.program.append(("split", [a], extra))
            widths += [extra, c - extra]
            return
        elif op == "chunk" and c % 2 == 0:
            self.program.append(("chunk", [a], None))
            widths += [c // 2, c // 2]
            return
        elif op == "shuffle" and divisors:
            extra = divisors[size % len(divisors)]
        elif op == "pad":
            extra, out = (size % 3, size % 2), c + size % 3 + size % 2
        elif op == "crop" and c > 2:
            extra, out = (1, c - size % 2), c - 1 - size % 2
        elif op == "unshuffle":
            out = 4 * c
        elif op == "flip":
            extra = size % 2
        if out > 24 or out < 1:
            return
        if made is None and extra is None and op not in ("add", "stack", "cat", "unshuffle", "pool"):
            op = "act"  # its size does not allow it
        if made is not None:
            self.parts[name] = made
        self.program.append((op, inputs, (name if made is not None else None, extra)))
        widths.append(out)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        seen = [x]
        for op, inputs, detail in self.program:
            operands = [seen[i] for i in inputs]
            out = self._run(op, operands, detail)
            seen += out if isinstance(out, list) else [out]
        return tuple(self.parts[f"out{i}"](seen[i - self.num_outputs]).mean((2, 3)) for i in range(self.num_outputs))

    def _run(self, op: str, operands: list[Tensor], detail: Any) -> Any:  # noqa: PLR0912
        x = operands[0]
        if op == "split":
            return list(torch.split(x, [detail, x.shape[1] - detail], dim=1))
        if op == "chunk":
            return list(x.chunk(2, dim=1))
        name, extra = detail
        part: Any = self.parts[name] if name is not None else None
        if op in ("add", "stack"):
            y = part(operands[1]) if part is not None else operands[1]
            return x + y if op == "add" else torch.stack([x, y], 1).amax(1)
        if op == "cat":
            return torch.cat(operands, 1)
        if op == "shared":
            return self.parts[extra](x)
        if op == "excite":
            return x * part(x)
        if op == "gate":
            return x * torch.sigmoid(part(x))
        if op == "scale":
            return x * part[0]
        if op == "pad":
            return F.pad(x, (0, 0, 0, 0, *extra))
        if op == "crop":
            return x[:, extra[0] : extra[1]]
        if op == "unshuffle":
            return F.interpolate(F.pixel_unshuffle(x, 2), scale_factor=2.0)
        if op == "flip":
            return x.flip(1) if extra else x.flip(3)
        if op == "shuffle" and extra:
            b, c, h, w = x.shape
            return x.view(b, extra, c // extra, h, w).transpose(1, 2).reshape(b, c, h, w)
        if op in ("transpose", "layer_norm"):
            return part(x.transpose(1, 3)).transpose(1, 3)
        if op == "pool":
            return F.max_pool2d(x, 3, 1, 1)
        return part(x) if part is not None else F.relu(x)


def step(ops: tuple[str, ...]) -> st.SearchStrategy[Step]:
    return st.tuples(st.sampled_from(ops), st.integers(0, 30), st.integers(0, 30), st.integers(2, 9))


def steps(most: int) -> st.SearchStrategy[list[Step]]:
    """Anything, and at its end one that must occur."""
    return st.builds(lambda some, last: [*some, last], st.lists(step(OPS), min_size=2, max_size=most), step(ASKED))


def check(plan: list[Step], seed: int) -> Counter[str]:
    """Cut one net by both realisers; what was in it, empty where no removal could show."""
    # Reads of the newest maps are likelier to make deep nets: operands count from the end.
    model = healthy(Dag([("conv", 0, 0, 6), *((op, -1 - a % 4, -1 - b % 6, size) for op, a, b, size in plan)]), seed)
    model.eval()
    dynamic = seed % 8 == 5  # three times as slow to capture
    program = capture(model, random(2, 3, 6, 6), train=False, dynamic_batch=dynamic)
    with within(10):
        coupling = couple(program)
    removed = removed_units(coupling, seed)
    if not removed:
        return Counter()
    hazard = Hazard(build=lambda: model, inputs=lambda b: ((random(b, 3, 6, 6),), {}))
    oracle = zeroed(model, coupling, removed, hazard).double()
    exact, batches = copy.deepcopy(model).double(), (1, 3) if dynamic else (2,)
    dense, expected = ([run(m, doubled(hazard.inputs(b))) for b in batches] for m in (exact, oracle))
    if all(distance(e, d) <= 1e-6 * scale(d) for e, d in zip(expected, dense, strict=True)):
        return Counter()  # only channels that nothing reads
    found = Counter({op for op, _, _ in model.program} | {"removed"})
    for realiser in ("graph", "auto"):
        pruned = prune(program, plan_of(program, coupling, removed), realiser=realiser)  # type: ignore[arg-type]
        small = copy.deepcopy(pruned.module).double()
        for b, e, d in zip(batches, expected, dense, strict=True):
            assert distance(run(small, doubled(hazard.inputs(b))), e) <= 1e-9 * scale(d)
    found[pruned.realiser] += 1
    return found


def tried(examples: int, most: int, **options: Any) -> Counter[str]:
    """How many of `examples` random nets lost channels, and how many of those had each ingredient."""
    tally: Counter[str] = Counter()

    @settings(max_examples=examples, **options)
    @given(steps(most), st.integers(0, 99))
    def every(plan: list[Step], seed: int) -> None:
        tally.update(check(plan, seed))

    every()
    return tally


def test_a_hundred_random_nets() -> None:
    tally = tried(100, 7, phases=[Phase.explicit, Phase.generate])
    assert tally["removed"] >= 80
    assert all(tally[op] >= 8 for op in ASKED), tally


@pytest.mark.slow
def test_a_thousand_random_nets() -> None:
    tally = tried(1000, 12, derandomize=False)
    assert tally["removed"] >= 800
    assert all(tally[op] >= 30 for op in set(OPS) - {"act"}), tally
    assert min(tally["module"], tally["graph"]) >= 20
