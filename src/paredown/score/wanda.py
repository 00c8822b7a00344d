"""wanda: size of a weight times the norm of its input (Sun et al. 2024, "Wanda", eq. 1).

S_ij = |W_ij| · √(mean x_j²), to be compared *within each output row*: allocate does so by itself, also where the rows of a
weight stored [in, out] lie along axis 1. Cells and units take √Σ S². Parameters that multiply no activation (norms, biases)
have an input of 1.

Statistics come from one pass through the dense model, or with `sequential` layer after layer as in the paper, from the inputs
that the masked layers before leave. One pass is the default: it needs no density, and which is better is open. Held-out loss
without training, one pass and sequential: a Llama of 260 thousand parameters 3.00 and 2.90 at 50 %, 4.16 and 4.19 at 2:4 (dense
1.27; the same order in three draws of calibration text); ResNet-20 with its batch norms measured anew 0.179 and 0.169 at 50 %,
0.380 and 0.652 at 2:4. In the walk batch norms keep the dense statistics, so that inputs drift with depth: for networks
without batch norm.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, fx

from paredown.errors import RejectedError, UsageError
from paredown.granularity import Granularity
from paredown.score.gradients import wide
from paredown.score.nouns import Computed, Elements, Source
from paredown.statistics.inputs import InputStatistics, input_statistics
from paredown.statistics.observe import state_of
from paredown.statistics.sequential import Run, inputs_now, layer_by_layer, own_state, recorded_calls
from paredown.statistics.uses import Use, find_uses, read_as_it_is


@dataclass(frozen=True, slots=True, kw_only=True)
class WandaOptions:
    """Whose inputs are measured."""

    sequential: bool = field(default=False, metadata={"came_later": True})
    """Layer after layer, each behind the masked ones (element, N:M); False: one pass over the model as it is."""
    density: float | None = field(default=None, metadata={"came_later": True})
    """Share of each output row that the layers before keep, with sequential: that of the masks to come. N:M brings its own."""

    def __post_init__(self) -> None:
        given: object = self.sequential  # a recipe may hold anything
        if not isinstance(given, bool):
            msg = f"sequential must be True or False. Got {given!r}."
            raise UsageError(msg)
        if self.density is None:
            return
        if not self.sequential:
            msg = f"density must come with sequential=True, whose earlier layers it masks. Got {self.density!r} alone."
            raise UsageError(msg)
        if not isinstance(self.density, float) or not 0 < self.density < 1:
            msg = f"density must be a share in (0, 1), what stays of each row. Got {self.density!r}."
            raise UsageError(msg)


def wanda(source: Source, options: WandaOptions) -> Iterator[Elements]:
    """Element saliency (|W| · ‖x‖)², whose root is the score."""
    _check(source.granularity, options)
    names = read_along_one_axis(source, "wanda")
    if options.sequential:
        seen = _Walk(source, options, names).seen
    else:
        seen = input_statistics(
            source.program,
            names,
            source.batches or (),
            loss=source.loss,
            gram=False,
            num_batches=source.num_batches,
            module=source.module,
        )
    norms = {n: _norms(s, source.weights[n]) for n, s in seen.items()}

    def saliency(name: str) -> Tensor:
        squares = wide(source.weights[name]).square()
        return squares.mul_(norms[name]) if name in norms else squares

    yield Computed(source.weights, saliency)


def _norms(seen: InputStatistics, weight: Tensor) -> Tensor:
    """Mean of x² beside every element."""
    return seen.along(seen.squared_norms.to(wide(weight).dtype), tuple(weight.shape))


def _check(cut: Granularity, options: WandaOptions) -> None:
    if not options.sequential:
        return
    if cut.kind not in ("element", "n:m"):
        msg = f"sequential must be used with granularity element or N:M. Got {cut}. Leave it out."
        raise UsageError(msg)
    if (options.density is None) != (cut.kind == "n:m"):
        wanted = f"no density, since {cut} brings its own" if cut.kind == "n:m" else "the density of the masks to come"
        msg = f"sequential must be given {wanted}. Got {options.density!r}."
        raise UsageError(msg)


class _Walk:
    """Statistics of each weight, taken behind the weights before it as they are masked by then."""

    def __init__(self, source: Source, options: WandaOptions, names: Sequence[str]) -> None:
        self.seen: dict[str, InputStatistics] = {}
        self._source, self._options, program = source, options, source.program
        self._state = own_state(state_of(program, source.module))
        uses = find_uses(program, names)
        for name in source.weights:
            if name not in names:  # scored without inputs: masked before anything runs
                self._mask(name, self._state[name].square(), 0)
        _warn_of_computed([n for n in names if not all(read_as_it_is(u) for u in uses[n])])
        self._calls = recorded_calls(program, source.batches or (), source.loss, source.num_batches)
        visit: dict[fx.Node, Callable[[Sequence[Run]], None]] = {}
        for name in names:
            visit[uses[name][0].node] = partial(self._settle, name, uses[name])
        layer_by_layer(program, self._state, self._calls, visit)

    def _settle(self, name: str, uses: list[Use], runs: Sequence[Run]) -> None:
        seen = inputs_now(self._source.program, self._state, self._calls, runs, name, uses, gram=False)
        self.seen[name], weight = seen, self._state[name]
        squares = wide(weight).square() * _norms(seen, weight)
        self._mask(name, squares, max(u.groups for u in uses) if seen.flipped else 0)

    def _mask(self, name: str, squares: Tensor, flipped: int) -> None:
        """Set to zero what allocate's uniform choice takes; `flipped` groups of a weight stored [in, out, …], else 0."""
        scores, cut = wide(squares).sqrt(), self._source.granularity
        if self._options.density is None:
            kept = torch.from_numpy(cut.keep_n_of_m(scores.numpy()))
        else:
            kept = _kept_in_rows(scores, 1.0 - self._options.density, flipped)
        self._state[name].masked_fill_(~kept, 0.0)


def _kept_in_rows(scores: Tensor, share: float, flipped: int) -> Tensor:
    """In the row of every output the lowest round(share × row) leave, the lower index first at a tie; at least one stays."""
    if flipped:  # [groups × in, out, …] → [groups, out, in, …]
        apart = scores.reshape(flipped, len(scores) // flipped, *scores.shape[1:]).transpose(1, 2)
        kept = _kept_in_rows(apart.flatten(0, 1), share, 0).reshape(apart.shape)
        return kept.transpose(1, 2).reshape(scores.shape)
    rows = scores.flatten(1)
    number = min(round(round(share * rows.shape[1], 6)), rows.shape[1] - 1)
    kept = torch.ones_like(rows, dtype=torch.bool)
    kept.scatter_(1, rows.argsort(dim=1, stable=True)[:, :number], False)
    return kept.reshape(scores.shape)


def _warn_of_computed(names: Sequence[str]) -> None:
    """A change in place is not seen behind what was computed from the weight before."""
    if names:
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warnings.warn(
            f"wanda leaves dense, for the layers behind, what is computed before it is used: {listed}.",
            UserWarning, stacklevel=6,
        )  # fmt: skip


def read_along_one_axis(source: Source, criterion: str) -> list[str]:
    """The weights whose inputs can be measured; the others are named in a warning and have inputs of 1."""
    if source.batches is None:
        msg = f"{criterion} must be given batches. Got None. Pass batches=… of inputs, or full batches and loss=…."
        raise UsageError(msg)
    wide = [n for n, w in source.weights.items() if w.dim() >= 2]
    uses = find_uses(source.program, wide)
    names = [n for n in wide if len({u.flipped for u in uses[n]}) == 1]
    others = [n for n in wide if n not in names]
    if not names:
        msg = f"{criterion} must find a linear layer or convolution among what is scored. Got none. Use l1 or l2."
        raise RejectedError(msg)
    if others:
        listed = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        warnings.warn(
            f"{criterion} takes inputs of size 1 where it cannot see them: {listed}.", UserWarning, stacklevel=5
        )
    return names
