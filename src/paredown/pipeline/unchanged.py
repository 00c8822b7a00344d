"""An evaluation that trains, or changes weights otherwise, is seen by their digests before and after it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from paredown.errors import RejectedError

_NAMED = 3


@contextmanager
def unchanged(networks: Iterable[nn.Module]) -> Iterator[None]:
    """While `evaluate` runs: raises RejectedError where a weight or a buffer of these networks is another one when the block ends.

    >>> net = nn.Linear(2, 1)
    >>> with unchanged([net]):
    ...     _ = net(torch.ones(1, 2))
    """
    held = list(networks)
    before = [_digests(n) for n in held]
    yield
    for network, known in zip(held, before, strict=True):
        now = _digests(network)
        names = [n for n in known | now if known.get(n) != now.get(n)]
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            msg = (
                f"evaluate must not change the network. Got other values in {', '.join(names[:_NAMED])}{more} when it had run. "
                "Let it call predict alone; what trains belongs into step or train."
            )
            raise RejectedError(msg)


def _digests(network: nn.Module) -> dict[str, bytes]:
    """Of every weight and buffer, by its bytes."""
    return {n: _digest(t) for n, t in network.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}


def _digest(tensor: torch.Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous().reshape(-1)
    found = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    if values.numel():
        found.update(values.view(torch.uint8).numpy().tobytes())
    return found.digest()
