"""Gradients: the user's loss on a copy of the model that shares its weights, batch by batch, and products with a Hessian."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from paredown.errors import RejectedError, UsageError
from paredown.layouts import guarded_layouts
from paredown.score.nouns import Source
from paredown.score.twice import TwiceDifferentiable, is_cut, refuse
from paredown.statistics.batches import taken

Mode = Literal["train", "eval"]
Receive = Callable[[nn.Parameter], None]


def working_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters share their values with the original; buffers are its own.

    Nothing writes to parameters here, and a second set of them would be as large as the model.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(module, memo).eval()


class Gradients:
    """Backward passes of `source.loss` for the weights of `source`, and no others."""

    def __init__(self, source: Source, criterion: str, *, mode: Mode = "eval", temperature: float = 1.0) -> None:
        if source.batches is None or source.loss is None:
            msg = f"{criterion} must be given batches and a loss. Got None. Pass batches=… and loss=lambda model, batch: scalar."
            raise UsageError(msg)
        if mode not in ("train", "eval"):
            msg = f"mode must be 'train' or 'eval'. Got {mode!r}."
            raise UsageError(msg)
        self._source, self._loss, self._criterion = source, source.loss, criterion
        self._model = working_copy(source.module).train(mode == "train")
        if temperature != 1.0:
            self._model.register_forward_hook(
                lambda _m, _i, out: pytree.tree_map(
                    lambda v: v / temperature if isinstance(v, Tensor) and v.is_floating_point() else v, out
                )
            )
        known = dict(self._model.named_parameters(remove_duplicate=False))
        missing = [n for n in source.weights if n not in known]
        if missing:
            msg = f"the module must have the program's parameters. Got none named {missing[0]!r}. Pass the captured model."
            raise RejectedError(msg)
        self.parameters: Mapping[str, nn.Parameter] = {n: known[n] for n in source.weights}
        self.distinct = list({id(p): p for p in self.parameters.values() if p.is_floating_point()}.values())
        for parameter in self.distinct:
            parameter.requires_grad_(True)

    def batches(self, *, per_sample: bool = False) -> Iterator[tuple[int, Any]]:
        """The first `num_batches` batches with their number, whole or one sample at a time."""
        assert self._source.batches is not None  # checked above
        number = -1
        for batch in taken(self._source.batches, self._source.num_batches):
            for part in samples(batch) if per_sample else (batch,):
                number += 1
                yield number, part
        if number < 0:
            msg = "batches must hold at least one batch. Got none."
            raise RejectedError(msg)

    def backward(self, batch: Any, number: int) -> None:
        """One backward pass; gradients are left in the parameters, for every tied name once."""
        for parameter in self.distinct:
            parameter.grad = None
        with self._seeded(number), torch.enable_grad():
            with guarded_layouts(self._model):
                loss = self._value(batch, number)
            loss.backward()

    def streamed(self, receive: Receive, *, per_sample: bool = False) -> int:
        """Backward passes over all batches; `receive` reads `.grad` as soon as it is there, then it is freed.

        Returns the number of passes. A tied parameter is received once per pass, with its whole gradient.
        """

        def take(parameter: Any) -> None:
            with torch.no_grad():
                receive(parameter)
            parameter.grad = None

        hooks = [p.register_post_accumulate_grad_hook(take) for p in self.distinct]
        try:
            passes = 0
            for number, batch in self.batches(per_sample=per_sample):
                self.backward(batch, number)
                passes += 1
        finally:
            for hook in hooks:
                hook.remove()
        return passes

    def hessian_products(self, batch: Any, number: int, vectors: Sequence[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
        """H v for each list of vectors (one per distinct parameter), H that of the loss of one batch: double backward.

        Raises RejectedError where a function has no second derivative in torch.
        """
        with self._seeded(number), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            with TwiceDifferentiable(), guarded_layouts(self._model):
                loss = self._value(batch, number)
            slopes = torch.autograd.grad(loss, self.distinct, create_graph=True, allow_unused=True)
            again = lambda: self._value(batch, number)  # noqa: E731
            if is_cut(slopes):
                raise refuse(self._criterion, "a function marked once_differentiable", self._model, again)
            for count, one in enumerate(vectors, start=1):
                parts = [(g * v).sum() for g, v in zip(slopes, one, strict=True) if g is not None and g.requires_grad]
                if not parts:
                    yield [torch.zeros_like(p) for p in self.distinct]
                    continue
                try:
                    found = torch.autograd.grad(
                        torch.stack(parts).sum(), self.distinct, retain_graph=count < len(vectors), allow_unused=True
                    )
                except RuntimeError as error:
                    if "memory" in str(error):
                        raise
                    raise refuse(self._criterion, str(error), self._model, again) from error
                yield [
                    torch.zeros_like(p) if h is None else h.detach() for p, h in zip(self.distinct, found, strict=True)
                ]

    def accumulators(self) -> dict[int, Tensor]:
        """Zeros by the identity of each distinct parameter, in float32 at least: squares of half-precision gradients are zero."""
        return {id(p): torch.zeros_like(wide(p)) for p in self.distinct}

    @contextmanager
    def _seeded(self, number: int) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._source.seed + number)
            yield

    def _value(self, batch: Any, number: int) -> Tensor:
        loss = self._loss(self._model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            msg = f"a loss must be a scalar tensor that depends on the model. Got {got} at batch {number}."
            raise RejectedError(msg)
        if not bool(torch.isfinite(loss)):
            msg = f"a loss must be finite. Got {loss.item()} at batch {number}. Look at that batch and its labels."
            raise RejectedError(msg)
        return loss.reshape(())


def wide(tensor: Tensor) -> Tensor:
    """The numbers of a tensor in float32, or wider where they are; no copy where they are that already."""
    tensor = tensor.detach()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def samples(batch: Any) -> Iterator[Any]:
    """A batch as batches of one sample: every tensor as long as the first one is cut along axis 0.

    Raises UsageError where the batch holds no tensor with an axis.

    >>> [tuple(part[0].shape) for part in samples((torch.zeros(2, 3), torch.zeros(2)))]
    [(1, 3), (1, 3)]
    """
    tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.dim() > 0]
    if not tensors:
        msg = f"a batch must hold tensors to be cut into samples. Got {type(batch).__name__}. Pass per_sample=False."
        raise UsageError(msg)
    length = len(tensors[0])
    for index in range(length):
        yield pytree.tree_map(
            lambda v, at=index: v[at : at + 1] if isinstance(v, Tensor) and v.dim() > 0 and len(v) == length else v,
            batch,
        )
