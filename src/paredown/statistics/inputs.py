"""Input statistics: what the inputs of a weight look like, by input of its matrix view, streamed in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from paredown.errors import RejectedError, ResourceError, UsageError
from paredown.program import Program
from paredown.statistics.observe import Sight, Step, observed
from paredown.statistics.uses import Use, find_uses

_GRAM_BYTES = 4 * 2**30
_CHUNK_BYTES = 64 * 2**20
"""Of the float64 matrix view of an input that is held at a time."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InputStatistics:
    """What a weight [out, K] is multiplied with. Groups are consecutive blocks of out / groups rows with their own inputs.

    That is the groups of a convolution, or the parts of one weight that read different activations (the projections of
    cross attention). Where one weight is used several times, all uses add up.
    """

    squared_norms: Tensor
    """Mean of x². Shape [groups, K], float64."""
    means: Tensor
    """Mean of x. Shape [groups, K], float64."""
    absolute_means: Tensor
    """Mean of |x|. Shape [groups, K], float64."""
    gram: Tensor | None
    """Mean of x xᵀ. Shape [groups, K, K], float64; None where it was not asked for or `rows` has it."""
    rows: Tensor | None = None
    """x / √positions, whose Gram matrix is `gram`. Shape [groups, positions, K], float64; where asked for and positions < K."""
    num_positions: int
    """Inputs x seen: samples × positions, of the group that saw most."""
    flipped: bool = False
    """Whether the weight is stored with its inputs along axis 0: as [K, out], or [groups × K, …] of a transposed
    convolution, whose inputs are channels; every tap sees the same ones."""

    def along(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """One value per input [groups, K], laid beside the elements of the weight: a tensor of `shape`.

        >>> seen = InputStatistics(squared_norms=torch.ones(1, 2), means=torch.ones(1, 2), absolute_means=torch.ones(1, 2), gram=None, num_positions=1)
        >>> seen.along(torch.tensor([[3.0, 4.0]]), (5, 2)).shape
        torch.Size([5, 2])
        """
        if self.flipped and values.numel() == shape[0]:
            return values.reshape(-1, *[1] * (len(shape) - 1)).expand(tuple(shape))
        if self.flipped:  # [K, out], parts of whose outputs have inputs of their own
            return values.T.repeat_interleave(math.prod(shape[1:]) // len(values), dim=1).reshape(tuple(shape))
        rows = shape[0] // len(values)
        return values[:, None, :].expand(-1, rows, -1).reshape(tuple(shape))


def input_statistics(
    program: Program,
    parameters: Iterable[str],
    batches: Iterable[Any],
    *,
    loss: Step | None = None,
    gram: bool = True,
    num_batches: int = 16,
    module: nn.Module | None = None,
    positions_per_sample: int | None = None,
    rows: bool = False,
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of linear layers, products and convolutions, by parameter; one pass, nothing is kept.

        x [K]: an input of the weight's matrix view [out, in·kh·kw]; patches of a convolution, per group.

    The eval graph runs on the first `num_batches` batches: inputs (a tensor, a tuple, {"args": …, "kwargs": …}), or
    whole batches with `loss(model, batch)`. Linear layers and convolutions of any number of axes, groups, stride,
    padding and dilation, functional ones, transposed ones, products with a parameter on either side, and slices of a
    parameter (attention's input projections). `gram` asks for Σ x xᵀ, K² numbers. `module` gives other weights than the
    captured ones. `rows`: fewer positions than inputs are given as they are instead of their Gram matrix, which is larger and
    has no more rank. `positions_per_sample` bounds how many patches of a convolution are looked at in each sample, drawn with
    a fixed seed (neighbours say nearly the same, and Σ x xᵀ costs K² for each); None looks at all. Neither the program nor the module is changed.

    Raises UsageError (a name that the program does not have, or that no such layer reads) and RejectedError (no batch,
    inputs that are not finite, with the
    parameter) and ResourceError (a Gram matrix above 4 GiB).

    >>> from paredown.program import capture
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> x = torch.randn(8, 4)
    >>> seen = input_statistics(capture(net, x), ["0.weight"], [x])["0.weight"]
    >>> bool(torch.allclose(seen.gram[0], (x.T @ x).double() / 8)), seen.num_positions
    (True, 8)
    """
    names = list(dict.fromkeys(parameters))
    uses = readable_uses(program, names)
    sums: dict[int, Sums] = {}
    sights = []
    for name in names:
        key = id(uses[name])  # names of one tied weight share their uses
        if key not in sums:
            sums[key] = Sums(name, uses[name], gram=gram, positions=positions_per_sample, rows=rows)
            sights += [Sight(node=u.source, look=partial(sums[key].add, u), reader=u.node) for u in uses[name]]
    observed(program, sights, batches, loss=loss, num_batches=num_batches, module=module)
    found: dict[int, InputStatistics] = {}
    for name in names:
        if id(uses[name]) not in found:
            found[id(uses[name])] = sums.pop(id(uses[name])).result(name)
    return {name: found[id(uses[name])] for name in names}


def readable_uses(program: Program, names: Sequence[str]) -> dict[str, list[Use]]:
    """The uses of each parameter; raises UsageError where a name is unknown or no linear layer or convolution reads it."""
    for name in names:
        if name not in program.state:
            msg = f"parameters must be those of the program. Got {name!r}."
            raise UsageError(msg)
    uses = find_uses(program, names)
    for name in names:
        if not uses[name]:
            msg = (
                f"a parameter must be read by a linear layer, a product or a convolution. Got {name}, which none reads."
            )
            raise UsageError(msg)
        if len({use.flipped for use in uses[name]}) > 1:
            msg = f"a parameter must be read along one axis. Got {name}, which is also used transposed."
            raise UsageError(msg)
    return uses


class Sums:
    """Streamed sums over the inputs of one parameter: Σ x, Σ |x|, Σ x² and, where asked for, Σ x xᵀ."""

    def __init__(
        self, name: str, uses: Sequence[Use], *, gram: bool, positions: int | None = None, rows: bool = False
    ) -> None:
        self._name = name
        self._positions = positions
        whole = len(uses) == 1 and tuple(uses[0].rows) == (0, uses[0].width)
        self._rows: list[Tensor] | None = [] if rows and gram and whole else None
        self._flipped = uses[0].flipped
        edges = [edge for use in uses for edge in use.rows]
        self._groups = uses[0].width // math.gcd(uses[0].width, *edges)
        self._groups = math.lcm(self._groups, *(use.groups for use in uses))
        self._length = uses[0].length
        self._count = torch.zeros(self._groups, dtype=torch.float64)
        self._sums = torch.zeros(3, self._groups, self._length, dtype=torch.float64)
        self._asked = gram
        self._gram = self._nothing() if gram and self._rows is None else None

    def _nothing(self) -> Tensor:
        size = 8 * self._groups * self._length**2
        if size > _GRAM_BYTES:
            msg = f"Gram matrices must fit into {_GRAM_BYTES / 2**30:.0f} GiB. Got {size / 2**30:.1f} GiB at {self._name}, which has {self._length} inputs. Leave it out."
            raise ResourceError(msg)
        return torch.zeros(self._groups, self._length, self._length, dtype=torch.float64)

    def add(self, use: Use, value: Tensor) -> None:
        """All inputs of one use in one call of the model."""
        block = use.width // self._groups
        blocks = slice(use.rows[0] // block, use.rows[1] // block)
        repeats = (blocks.stop - blocks.start) // use.groups
        if not self._asked and use.spatial and not use.flipped:
            self._add_over_samples(use, value, blocks, repeats)
            return
        for x in inputs_of(value, use, self._positions):  # [positions, groups of the use, K]
            parts = torch.stack([x.sum(0), x.abs().sum(0), x.square().sum(0)])
            self._sums[:, blocks] += parts.repeat_interleave(repeats, dim=1)
            self._count[blocks] += len(x)
            if self._rows is not None:
                self._keep(x.transpose(0, 1).repeat_interleave(repeats, dim=0))
            elif self._gram is not None:
                apart = x.transpose(0, 1)
                self._gram[blocks] += (apart.transpose(1, 2) @ apart).repeat_interleave(repeats, dim=0)

    def _keep(self, x: Tensor) -> None:
        """Inputs [groups, positions, K] as they are, while there are fewer of them than K."""
        assert self._rows is not None
        self._rows.append(x)
        if sum(r.shape[1] for r in self._rows) >= self._length:
            self._gram = self._nothing()
            for r in self._rows:
                self._gram += r.transpose(1, 2) @ r
            self._rows = None

    def _add_over_samples(self, use: Use, value: Tensor, blocks: slice, repeats: int) -> None:
        """Without products of two inputs the samples can be summed before the windows are laid out, and those as views."""
        value = value if use.axis == 1 else value[None]
        three = torch.zeros((3, *value.shape[1:]), dtype=torch.float64)
        for sample in value:
            wide = sample.double()
            three[0] += wide
            three[1] += wide.abs()
            three[2].addcmul_(wide, wide)
        windows = _windows(three, use)
        places = tuple(range(2, 2 + use.spatial))
        sums = windows.sum(places).reshape(3, use.groups, -1)
        self._sums[:, blocks] += sums.repeat_interleave(repeats, dim=1)
        self._count[blocks] += math.prod(windows.shape[2 : 2 + use.spatial]) * len(value)

    def result(self, name: str) -> InputStatistics:
        """The means; raises RejectedError where nothing was seen or it is not finite. To be called once: Σ x xᵀ becomes its mean."""
        if not bool(torch.isfinite(self._sums).all()):
            msg = (
                f"activations must be finite. Got NaN or infinity at the input of {name}. Look for NaN in the batches."
            )
            raise RejectedError(msg)
        count = self._count.clamp(min=1.0)
        means = self._sums / count[:, None]
        return InputStatistics(
            squared_norms=means[2],
            means=means[0],
            absolute_means=means[1],
            gram=None if self._gram is None else self._gram.div_(count[:, None, None]),
            rows=torch.cat(self._rows, dim=1) / count.sqrt()[:, None, None] if self._rows else None,
            num_positions=int(self._count.max()),
            flipped=self._flipped,
        )


def inputs_of(value: Tensor, use: Use, most: int | None = None) -> Iterator[Tensor]:
    """What the weight is multiplied with at one call, in parts. Shape [positions, groups of the use, K], float64.

    `most` is how many positions of a convolution are taken from each sample; None takes all.
    """
    if not use.spatial:
        flat = value.movedim(use.axis, -1).reshape(-1, value.shape[use.axis])
        size = max(1, _CHUNK_BYTES // (8 * max(flat.shape[1], 1)))
        for start in range(0, len(flat), size):
            yield flat[start : start + size, None].double()
        return
    value = value if use.axis == 1 else value[None]
    if use.flipped:
        flat = value.movedim(1, -1).reshape(-1, use.groups, value.shape[1] // use.groups)
        yield flat.double()
        return
    taps = math.prod(w.kernel for w in use.window)
    positions = math.prod(value.shape[2:]) // math.prod(w.stride for w in use.window) + 1
    positions = positions if most is None else min(positions, most)
    size = max(1, _CHUNK_BYTES // (8 * value.shape[1] * taps * positions))
    for start in range(0, len(value), size):
        part = _windows(value[start : start + size].double(), use)
        part = part.movedim(1, 1 + use.spatial)  # [samples, *positions, channels, *kernel]
        if most is not None and most < math.prod(part.shape[1 : 1 + use.spatial]):
            index: tuple[Any, ...] = (slice(None), *_drawn(part.shape[1 : 1 + use.spatial], most))
            part = part[index]
        yield part.reshape(-1, use.groups, value.shape[1] // use.groups * taps)


def _windows(value: Tensor, use: Use) -> Tensor:
    """All that a convolution looks at, padded; a view. Shape [samples, channels, *positions, *kernel]."""
    part = nn.functional.pad(value, [p for w in reversed(use.window) for p in (w.before, w.after)])
    for axis, w in enumerate(use.window):
        part = part.unfold(2 + axis, w.dilation * (w.kernel - 1) + 1, w.stride)[..., :: w.dilation]
    return part


def _drawn(shape: Sequence[int], count: int) -> tuple[Tensor, ...]:
    """`count` different positions of a grid, the same at every call."""
    places = torch.randperm(math.prod(shape), generator=torch.Generator().manual_seed(0))[:count]
    return torch.unravel_index(places, tuple(shape))
