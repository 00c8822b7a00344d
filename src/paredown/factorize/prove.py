"""The proof of a factorization: on random factors, the chains must equal the dense graph with their product as weight."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.errors import VerificationError
from paredown.plan import Rank
from paredown.program import Program
from paredown.prune.example import healthy_inputs
from paredown.prune.factors import Layer, factor_names, links, product
from paredown.prune.nouns import Proof
from paredown.prune.prove import (
    Reference,
    compare,
    healthy,
    holds,
    in_dtype,
    run_dense,
    tells,
)


def factor_reference(
    program: Program,
    layers: Mapping[str, Layer],
    ranks: Mapping[str, Rank],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Reference:
    """Random weights and factors; the dense graph's outputs with its own weights, and with the factors' products.

    Where the output does not tell the two apart the weights are drawn anew with less gain.
    Raises VerificationError where it never does: equality would prove nothing.
    """
    inputs = pytree.tree_map(lambda t: in_dtype(t, dtype), healthy_inputs(program, seed))
    for attempt in range(3):
        gain = 1.0 / (1 + attempt)
        state = healthy(program, seed + attempt, gain=gain)
        state = {n: in_dtype(t, dtype) for n, t in state.items()}
        factors = random_factors(layers, ranks, seed=seed + attempt, gain=gain, dtype=dtype)
        replaced = dict(state)
        for parameter, layer in layers.items():
            whole = product(factors[parameter], ranks[parameter].method, layer.groups)
            replaced.update(dict.fromkeys(layer.names, layer.stored(whole, state[parameter])))
        with torch.no_grad():
            dense = run_dense(program, state, inputs, None, dtype)
            masked = run_dense(program, replaced, inputs, None, dtype)
        if tells(dense, masked):
            break
    else:
        names = ", ".join(list(layers)[:3])
        msg = f"the output must be finite and depend on the factorized weights, or a proof would be empty. Got no move from {names}. Exclude them."
        raise VerificationError(msg)
    return Reference(
        state=_with_factors(program, layers, state, factors), inputs=inputs, dense=dense, masked=masked, dtype=dtype,
        program=program,
    )  # fmt: skip


def random_factors(
    layers: Mapping[str, Layer], ranks: Mapping[str, Rank], *, seed: int, gain: float, dtype: torch.dtype
) -> dict[str, tuple[Tensor, ...]]:
    """Factors of variance gain² / fan-in, drawn apart from the weights."""
    generator = torch.Generator().manual_seed(seed + 7919)
    out = {}
    for parameter, layer in layers.items():
        drawn = []
        for number, link in enumerate(links(layer.shape, layer.conv, ranks[parameter])):
            spread = (gain if number == 0 else 1.0) / math.sqrt(math.prod(link.shape[1:]))
            drawn.append((torch.randn(link.shape, generator=generator) * spread).to(dtype))
        out[parameter] = tuple(drawn)
    return out


def prove_factors(
    program: Program,
    module: nn.Module,
    layers: Mapping[str, Layer],
    ranks: Mapping[str, Rank],
    known: Reference,
    *,
    seed: int = 0,
) -> Proof:
    """Compare the factorized module with the dense graph whose weights are the products of the same random factors.

    Holds where max |factorized − dense with products| ≤ 1e-4 × max |dense| in float32, or, if not, ≤ 1e-9 in float64.
    `Proof.moved` says how far the products move the output. Raises VerificationError with the Proof as evidence.
    """
    proof = compare(module, known)
    if not holds(proof):
        again = factor_reference(program, layers, ranks, seed=seed, dtype=torch.float64)
        proof = compare(module, again)
    if not holds(proof):
        msg = (
            f"factorized must equal dense with the factors' products as weights. Got a difference of {proof.max_error:.2e} at "
            f"output scale {proof.scale:.2e} in {proof.mode}. Use the graph realiser, or exclude the layer that a class treats specially."
        )
        raise VerificationError(msg, proof)
    return proof


def _with_factors(
    program: Program,
    layers: Mapping[str, Layer],
    state: Mapping[str, Tensor],
    factors: Mapping[str, tuple[Tensor, ...]],
) -> dict[str, Tensor]:
    """The random state under the names of both realisers: factors for weights; a bias also where nn.Sequential has it."""
    gone = {name for layer in layers.values() for name in layer.names}
    out = {n: t for n, t in state.items() if n not in gone}
    for parameter, layer in layers.items():
        for alias in layer.names:
            names = factor_names(alias, len(factors[parameter]), program.state)
            out.update(zip(names, factors[parameter], strict=True))
            bias = f"{alias.rpartition('.')[0]}.bias"
            if bias in state:
                out[f"{names[-1].removesuffix('weight')}bias"] = state[bias]
    return out
