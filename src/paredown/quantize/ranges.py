"""Whether calibration inputs are of the kind that the network sees: beside other inputs, by themselves, and by its batch norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from paredown.program import Inputs, Program, placeholder_names
from paredown.quantize.decompose import op_name
from paredown.statistics.sequential import Run

ANOTHER_RANGE = 5.0
"""Inputs this many times wider or narrower than others are another kind of data."""
BYTE, BRIGHT = 255.0, 64.0
"""Raw pixels are whole numbers from 0 to 255, and some of them are no small ones."""
_PICTURE_AXES = 3


def range_of(
    tensors: Iterable[Tensor], so_far: tuple[float, float] = (float("inf"), float("-inf"))
) -> tuple[float, float]:
    """(smallest, largest) finite value of the floating tensors.

    >>> range_of([torch.tensor([1.0, -2.0]), torch.tensor([3])])
    (-2.0, 1.0)
    """
    low, high = so_far
    for tensor in tensors:
        finite = tensor[torch.isfinite(tensor)] if tensor.is_floating_point() else tensor[:0]
        if finite.numel():
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    return low, high


def differ(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two ranges are those of different kinds of data; False where either is not known or has no width.

    >>> differ((0.0, 255.0), (0.0, 1.0)), differ((-2.1, 2.6), (0.0, 1.0))
    (True, False)
    """
    width, seen = one[1] - one[0], other[1] - other[0]
    if not (math.isfinite(width) and math.isfinite(seen) and width > 0 and seen > 0):
        return False
    return not 1 / ANOTHER_RANGE < width / seen < ANOTHER_RANGE


def apart(calibration: tuple[float, float], other: tuple[float, float], whose: str) -> str:
    """A sentence where calibration inputs have another range than others, as 0…255 for 0…1; "" where they do not.

    >>> apart((0.0, 255.0), (0.0, 1.0), "those that evaluate gives")
    'calibration inputs lie in [0, 255], those that evaluate gives in [0, 1]: normalise both in the same way'
    """
    if not differ(calibration, other):
        return ""
    return (
        f"calibration inputs lie in [{calibration[0]:.4g}, {calibration[1]:.4g}], {whose} in [{other[0]:.4g}, "
        f"{other[1]:.4g}]: normalise both in the same way"
    )


class Watched:
    """`predict` as before, and the range of what it was given."""

    def __init__(self, predict: Callable[..., Any]) -> None:
        self._predict = predict
        self.range = range_of(())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the predictor answers."""
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.range = range_of(given, self.range)
        return self._predict(*args, **kwargs)


def raw_pixels(tensors: Iterable[Tensor]) -> bool:
    """Whether the floating inputs with two axes or more per sample are whole numbers from 0 to 255, as of pictures that nobody normalised.

    >>> raw_pixels([torch.full((2, 3, 4, 4), 200.0)]), raw_pixels([torch.rand(2, 3, 4, 4)])
    (True, False)
    """
    pictures = [t for t in tensors if t.is_floating_point() and t.dim() >= _PICTURE_AXES and t.numel()]
    return bool(pictures) and all(
        float(t.min()) >= 0 and BRIGHT <= float(t.max()) <= BYTE and bool((t == t.round()).all()) for t in pictures
    )


def beside_training(program: Program, call: Inputs) -> str:
    """A sentence where the first batch norm reads other values than those that it was trained on; "" where it does not.

        √median_c E[(x_c - μ_c)²] / σ²_c   over samples and positions, μ and σ² the running statistics: 1 on the training data

    Channels that are constant here, as those of a filter of zeros, say nothing. A network without batch norm remembers no data, and
    one whose statistics are as they were made has seen none; what is left in them of how they were made is taken off, too.
    """
    names = placeholder_names(program.eval_graph)
    body = program.eval_graph.graph_module
    found = _first_batch_norm(body, names)
    if found is None:
        return ""
    mean, variance = (program.state[names[str(a.name)]].detach() for a in found.args[3:5])  # type: ignore[union-attr]
    if bool((mean == 0).all() and (variance == 1).all()):
        return ""
    given = iter(pytree.tree_leaves(pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, call)))
    flat = [program.state[names[n.name]] if n.name in names else next(given) for n in _holders(body)]
    run = Run(body, flat)
    with torch.no_grad():
        for node in body.graph.nodes:
            if node is found:
                break
            run.next(node)
    x: Tensor = run.env[found.args[0]]  # type: ignore[index]
    rows = x.movedim(1, 0).flatten(1)
    vary = rows.amax(1) > rows.amin(1) if rows.shape[1] > 1 else torch.ones_like(mean, dtype=torch.bool)
    if not bool(vary.any()):
        return ""
    name = names[str(found.args[3].name)].removesuffix(".running_mean")  # type: ignore[union-attr]
    left = _left_of_start(program, found, name)
    held = ((mean, variance), (mean / (1 - left), ((variance - left) / (1 - left)).clamp(min=0)))
    every = [float(((rows - m[:, None]).square().mean(1) / (v + 1e-12))[vary].median().sqrt()) for m, v in held]
    times = every[0]
    if any(1 / ANOTHER_RANGE < t < ANOTHER_RANGE for t in every):
        return ""
    return (
        f"calibration inputs are of another range than the training data: the values that the batch norm {name} reads are {times:.3g} times as "
        "far from its running mean as in training: normalise them as the training data were"
    )


def _left_of_start(program: Program, norm: fx.Node, name: str) -> float:
    """The share that mean 0 and variance 1, with which it began, have in the statistics of a batch norm: (1 - momentum)ⁿ after n batches."""
    count = int(program.state.get(f"{name}.num_batches_tracked", torch.zeros(())))
    momentum = float(norm.args[6]) if len(norm.args) > 7 else 0.0  # type: ignore[arg-type]
    return (1 - momentum) ** count if count and 0 < momentum < 1 else 0.0  # 0 stands for a plain mean over the batches


def _holders(body: fx.GraphModule) -> list[fx.Node]:
    return [n for n in body.graph.nodes if n.op == "placeholder"]


def _first_batch_norm(body: fx.GraphModule, names: Any) -> fx.Node | None:
    """The first one that reads what comes of the inputs, with running statistics of its own."""
    node: fx.Node
    active = {n for n in _holders(body) if n.name not in names}
    for node in body.graph.nodes:
        if node.op != "call_function" or not any(a in active for a in node.all_input_nodes):
            continue
        active.add(node)
        if op_name(node) == "batch_norm" and len(node.args) >= 5:
            held = node.args[3:5]
            if all(isinstance(a, fx.Node) and a.name in names for a in held) and node.args[0] in active:
                return node
    return None
