"""How far a simulation is from itself when its float sums round otherwise: nobody's file can be held to less.

A rounding step that flips moves a value by a whole step, and the layers behind it carry that on. In a network that amplifies it
(deep transformers, above all with random weights), two correct executions of the same codes end further apart than a
cosine of 0.999. So, where a file misses that, the simulation runs again with its float results disturbed by a part in a million.
A runtime that rounds in an order of its own throughout may be further away than that. Then the float network decides, which both stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from paredown.export.session import predictor
from paredown.quantize.batches import filled, tensors_of
from paredown.quantize.nouns import Quantized

NOISE = 1e-6
"""Relative: what float32 sums of some hundred terms in two orders differ by (eps 6e-8 × the root of the terms)."""
DRAWS = 4
MARGIN = 2.0
"""The file may be as far as twice the farthest draw, in 1 - cosine."""
LEAST = 0.98
"""Below this cosine nothing is excused, however the network amplifies."""
AMPLIFIES = 0.999
"""A simulation that is below this cosine to itself amplifies rounding: only then the float network is asked."""


def own_cosine(quantized: Quantized, part: Any, *, draws: int = DRAWS, noise: float = NOISE) -> float:
    """Smallest cosine over `draws` between a simulation's outputs and those with its float results times 1 + noise · N(0, 1).

    `part` is (args, kwargs) of one batch. Codes, views and the results of dequantization stay as they are.

    >>> import torch
    >>> from torch import nn
    >>> from paredown.program import capture
    >>> from paredown.quantize import quantize
    >>> x = torch.randn(8, 4)
    >>> own_cosine(quantize(capture(nn.Linear(4, 3), x), calibrate=[x]), ((x,), {})) > 0.999
    True
    """
    args, kwargs = filled(quantized.program, part)
    kwargs = {k: kwargs[k] for k in quantized.inputs.kwargs if k in kwargs}
    generator, smallest = torch.Generator().manual_seed(0), 1.0
    with torch.no_grad():
        expected = tensors_of(quantized.module(*args, **kwargs))
        for _ in range(draws):
            disturbed = _Disturbed(quantized.module, noise, generator)
            got = tensors_of(disturbed.run(*pytree.tree_leaves((args, kwargs)), enable_io_processing=False))
            smallest = min(smallest, *(cosine_of(a, b) for a, b in zip(got, expected, strict=True)))
    return smallest


def excuse(reference: Any, part: Any, cosine: float, answers: Sequence[Tensor] = ()) -> str:
    """Why a file with that cosine still holds, as a note; "" where the simulation's own rounding does not explain it.

    `answers` are the file's outputs for `part`. With e the error of the simulation and f that of the file, both against the float
    network, two right ways to round give |f| ≈ |e| and, where they have nothing in common, |f - e|² = |f|² + |e|².
    A wrong file is taken to be further from the float network than the simulation is, as those with flipped bits of codes are.
    """
    own = _own(reference, part) if LEAST <= cosine < 1 else None
    if own is None:
        return ""
    disturbed = f"this network amplifies rounding: with its float results disturbed by {NOISE:g} the simulation differs from itself by a cosine of {own:.6f}"
    if 1 - cosine <= MARGIN * (1 - own):
        return f"{disturbed}, so the file's {cosine:.6f} says no more than that"
    if own >= AMPLIFIES or not answers:
        return ""
    far = _from_float(reference, part, answers)
    if any(file < simulation or 1 - cosine > 2 - file - simulation for file, simulation in far):
        return ""
    file, simulation = min(far)
    return (
        f"{disturbed}, and the file, with a cosine of {cosine:.6f} to the simulation, is as near to the float network ({file:.6f}) as the "
        f"simulation is ({simulation:.6f})"
    )


def hopeless(reference: Any, part: Any, cosine: float) -> str:
    """What to add to a refusal below LEAST where the simulation is as far from itself: a sentence, or "" where it is not."""
    own = _as_far(reference, part, cosine) if cosine < LEAST else None
    if own is None:
        return ""
    return (
        f" With its float results disturbed by {NOISE:g} the simulation differs from itself by a cosine of {own:.3f}: this network amplifies rounding "
        "so far that no file of it can be told right from wrong, as deep ones with random weights do. Train it first, or go by the metric of the file."
    )


def _as_far(reference: Any, part: Any, cosine: float) -> float | None:
    """The simulation's own cosine where it explains the file's; None where it does not, or cannot be asked."""
    own = _own(reference, part)
    return None if own is None or 1 - cosine > MARGIN * (1 - own) else own


def _own(reference: Any, part: Any) -> float | None:
    return own_cosine(reference, part) if isinstance(reference, Quantized) and part is not None else None


def _from_float(reference: Quantized, part: Any, answers: Sequence[Tensor]) -> list[tuple[float, float]]:
    """(file, simulation): cosines of every output to the float network's."""
    args, kwargs = filled(reference.program, part)
    sides = [tensors_of(predictor(side)(*args, **kwargs)) for side in (reference.program, reference)]
    return [
        (cosine_of(a, f[: len(a)]), cosine_of(q[: len(a)], f[: len(a)]))
        for a, f, q in zip(answers, *sides, strict=True)
    ]


def cosine_between_runtimes(cosine: float) -> float:
    """What two runtimes may differ by where the file was excused in one: 1 - MARGIN · (1 - cosine), at least LEAST, for cosine in [0, 1].

    Each is as far from the simulation as rounding takes it, in a direction of its own.

    >>> round(cosine_between_runtimes(0.998), 6), cosine_between_runtimes(0.5)
    (0.996, 0.98)
    """
    return max(LEAST, 1 - MARGIN * (1 - cosine))


class _Disturbed(torch.fx.Interpreter):
    def __init__(self, graph: torch.fx.GraphModule, noise: float, generator: torch.Generator) -> None:
        super().__init__(graph)
        self.noise, self.generator = noise, generator

    def run_node(self, n: torch.fx.Node) -> Any:
        out = super().run_node(n)
        computed = n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload) and not _passes_on(n.target)
        if not computed or not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        shaken = torch.randn(out.shape, generator=self.generator).to(out)
        return out * (1 + self.noise * shaken)


def _passes_on(op: torch._ops.OpOverload) -> bool:
    """Views, and what turns codes into numbers: no sum in them."""
    return "quantize" in op.name() or any(r.alias_info is not None for r in op._schema.returns)


def cosine_of(a: Tensor, b: Tensor) -> float:
    """Cosine similarity of two whole tensors, in float64; where one is all zeros, 1 if both are, else 0.

    >>> round(cosine_of(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])), 4)
    0.7071
    """
    x, y = a.double().reshape(-1), b.double().reshape(-1)
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms else float(bool((x == y).all()))


__all__ = ["cosine_between_runtimes", "cosine_of", "excuse", "hopeless", "own_cosine"]
