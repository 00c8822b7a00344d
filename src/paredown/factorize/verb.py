"""factorize: replace weights by chains of smaller layers and prove it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.errors import NothingToDo, UsageError, VerificationError, must_be
from paredown.factorize.decompose import NEEDS_DATA, Factoring, Seen, factors_of
from paredown.factorize.prove import factor_reference, prove_factors
from paredown.plan import Plan, Rank
from paredown.program import Program, capture
from paredown.prune.factor_graph import Factors, factor_state, realise_factor_graph
from paredown.prune.factor_module import realise_factor_module
from paredown.prune.factors import Layer, found
from paredown.prune.nouns import Pruned
from paredown.prune.prove import Reference, in_dtype, own_move, same_in_train
from paredown.prune.remove import compose
from paredown.statistics.batches import Given, once

Realiser = Literal["auto", "module", "graph"]


def factorize(
    source: Program | Pruned,
    plan: Plan,
    *,
    batches: Given | None = None,
    statistics: Mapping[str, Seen] | None = None,
    num_batches: int = 16,
    alpha: float = 0.5,
    sweeps: int = 2,
    realiser: Realiser = "auto",
    seed: int = 0,
) -> Pruned:
    """Replace every weight that `plan.ranks` names by a chain of low-rank factors, and prove the structure.

    Matrix methods (svd, asvd, svd_llm) give two layers, W [out, K] ≈ A [out, r] · B [r, K]; a convolution becomes one to
    r channels and a 1×1. spatial_svd gives k×1 and 1×k, tucker2 1×1, k×k and 1×1. Stride, padding, dilation, groups and
    bias (on the last layer) are those of the layer. asvd and svd_llm need `batches` of inputs (the first `num_batches`
    are read) or `statistics` of `paredown.statistics.input_statistics`; `alpha` is ASVD's exponent, `sweeps` are HOOI
    sweeps of tucker2. Formulas: see `factors_of`.

    realiser "module" puts nn.Sequential in the place of nn.Linear and nn.Conv in a copy of the user's class, "graph"
    rebuilds the model from its exported graphs (attention projections, bare parameters); "auto" takes the module
    wherever its proof holds. A Pruned as source is captured again, and the result is both, composed.

    Raises UsageError (a plan that does not fit), NothingToDo (no ranks), RejectedError (no data, or not finite) and
    VerificationError (no realiser gives a proven result).

    >>> from paredown.program import capture
    >>> net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> plan = Plan(keep={}, ranks={"0.weight": Rank(method="svd", ranks=(4,))})
    >>> small = factorize(capture(net, torch.zeros(2, 16)), plan)
    >>> small.module[0], small.realiser
    (Sequential(
      (0): Linear(in_features=16, out_features=4, bias=False)
      (1): Linear(in_features=4, out_features=16, bias=True)
    ), 'module')
    """
    if realiser not in ("auto", "module", "graph"):
        msg = f"realiser must be auto, module or graph. Got {realiser!r}."
        raise UsageError(msg)
    must_be("plan", plan, Plan, fix="Use paredown.choose_ranks(program, budget).")
    program = program_of(source)
    layers, plan = _planned(program, plan)
    how = Factoring(alpha=alpha, sweeps=sweeps)
    seen = input_statistics_for(program, layers, plan.ranks, batches, statistics, num_batches)
    with torch.no_grad():
        factors = {
            p: factors_of(layer, program.state[p], plan.ranks[p], seen=seen.get(p), how=how)
            for p, layer in layers.items()
        }
    known = factor_reference(program, layers, plan.ranks, seed=seed)
    attempt = _Attempt(program=program, plan=plan, layers=layers, factors=factors, known=known, seed=seed)
    done = _realised(attempt, realiser)
    return compose(source, done, seed=seed) if isinstance(source, Pruned) else done


def program_of(source: Any) -> Program:
    """The program to factorize: a Pruned is captured again as it is now."""
    if isinstance(source, Program):
        return source
    if isinstance(source, Pruned):
        args, kwargs = source.program.inputs
        return capture(source.module, {"args": args, "kwargs": kwargs})
    msg = f"what is factorized must be a Program or a Pruned. Got {type(source).__name__}. Use paredown.capture(model, inputs)."
    raise UsageError(msg)


def input_statistics_for(
    program: Program,
    layers: Mapping[str, Layer],
    ranks: Mapping[str, Rank],
    batches: Given | None,
    statistics: Mapping[str, Seen] | None,
    num_batches: int,
) -> Mapping[str, Seen]:
    """Statistics of the layers whose method reads data: those given, or measured on `batches`."""
    needed = [p for p in layers if ranks[p].method in NEEDS_DATA]
    if statistics is not None:
        return statistics
    if not needed:
        return {}
    if batches is None:
        method = ranks[needed[0]].method
        msg = f"{method} must be given batches of inputs, or statistics. Got neither. svd, spatial_svd and tucker2 need none."
        raise UsageError(msg)
    from paredown.statistics.inputs import input_statistics

    gram = any(ranks[p].method == "svd_llm" for p in needed)
    return input_statistics(program, needed, once(batches), gram=gram, num_batches=num_batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    program: Program
    plan: Plan
    layers: Mapping[str, Layer]
    factors: Factors
    known: Reference
    seed: int

    def graph(self) -> nn.Module:
        return realise_factor_graph(self.program, self.layers, self.plan.ranks, self.factors)


def _planned(program: Program, plan: Plan) -> tuple[dict[str, Layer], Plan]:
    """The layers of a plan, which is rewritten to the weights' first names."""
    others = [n for n in ("keep", "drop_modules", "masks") if getattr(plan, n)]
    if others:
        msg = f"a plan to factorize must hold ranks alone. Got {', '.join(others)} too. Prune first, then factorize the result."
        raise UsageError(msg)
    if not plan.ranks:
        msg = "a plan to factorize must hold ranks. Got none."
        raise NothingToDo(msg)
    every = found(program)
    layers: dict[str, Layer] = {}
    ranks: dict[str, Rank] = {}
    for name, rank in sorted(plan.ranks.items()):
        layer = every.layer(name)
        if layer.parameter in layers:
            msg = f"a weight must be given ranks once. Got {name!r}, which shares its storage with another name of the plan."
            raise UsageError(msg)
        layers[layer.parameter], ranks[layer.parameter] = layer, rank
    return layers, dataclasses.replace(plan, ranks=ranks)


def _realised(attempt: _Attempt, realiser: Realiser) -> Pruned:
    if realiser != "graph":
        done = _by_module(attempt)
        if isinstance(done, Pruned):
            return done
        if realiser == "module":
            raise done
    return _proven(attempt, attempt.graph(), "graph")


def _by_module(attempt: _Attempt) -> Pruned | VerificationError:
    """The user's class with nn.Sequential in the layers' places, if it computes the same in both modes."""
    module = realise_factor_module(attempt.program.module, attempt.plan.ranks)
    if module is None:
        return VerificationError(
            "the module realiser needs weights of torch's own nn.Linear and nn.Conv. Got others. Use the graph realiser."
        )
    try:
        fill(module, attempt)
        done = _proven(attempt, module, "module")
        if same_in_train(_single(attempt.program), module, attempt.graph(), attempt.known, seed=attempt.seed):
            return done
        return VerificationError(
            "the class must train as its graph does. Got other outputs in train mode. Use the graph realiser."
        )
    except VerificationError as error:
        return error
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, AttributeError) as error:
        # The class reads more of a layer than its output (nn.MultiheadAttention reads out_proj.weight), or multiplies by
        # its weight from the other side: then the factors do not fit the layers.
        refused = VerificationError(
            f"the class must call its layers as modules. Got {type(error).__name__}: {error}. Use the graph realiser."
        )
        refused.__cause__ = error
        return refused


def _single(program: Program) -> Program:
    """The program with float32 inputs, as the random weights of the proof are."""
    inputs = pytree.tree_map(lambda t: in_dtype(t, torch.float32), program.inputs)
    return dataclasses.replace(program, inputs=inputs)


def fill(module: nn.Module, attempt: _Attempt) -> None:
    """Set the factors as weights."""
    made: dict[str, Tensor] = {}
    for parameter, layer in attempt.layers.items():
        made.update(factor_state(layer, attempt.program, attempt.factors[parameter]))
    with torch.no_grad():
        for name, tensor in made.items():
            module.get_parameter(name).copy_(tensor)


def _proven(attempt: _Attempt, module: nn.Module, realiser: Literal["module", "graph"]) -> Pruned:
    proof = prove_factors(attempt.program, module, attempt.layers, attempt.plan.ranks, attempt.known, seed=attempt.seed)
    return Pruned(
        module=module,
        program=attempt.program,
        plan=attempt.plan,
        realiser=realiser,
        proof=dataclasses.replace(proof, own_move=own_move(attempt.program, module)),
    )
