"""Ranks: one training by the processes that torchrun started. Prune first: each rank wraps the small model by itself.

Every rank calls `batches()`, which gives all the same, and takes its part of the samples of each batch; gradients are
averaged by DistributedDataParallel, weighted by samples. For a loss that is a mean over samples, dropout and batch norm
aside, that is the training of one process with the whole batch. Batch norm sees the samples of its own rank; its
running statistics, and all other buffers (observers, counters), are those of rank 0 after every step. So all ranks hold
the same bits after every step, which is compared at the end of every epoch. Only rank 0 writes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.errors import RejectedError, UsageError, VerificationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among those that train one model."""

    rank: int
    world: int
    """How many there are."""
    device: torch.device

    @classmethod
    def of(cls, device: torch.device) -> Ranks:
        """This process of the group. Raises UsageError where there is none."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            msg = 'distributed training must have a process group. Got none. Run by torchrun, and call torch.distributed.init_process_group("nccl") ("gloo" on CPUs) first.'
            raise UsageError(msg)
        return cls(rank=torch.distributed.get_rank(), world=torch.distributed.get_world_size(), device=device)

    def wrapped(self, module: nn.Module) -> nn.Module:
        """What the step calls. Buffers are left to `share_buffers`: written in a forward, they would break a second one."""
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)

    def part(self, batch: Any, length: int) -> Any:
        """The samples of a batch that are this rank's: axis 0 of every tensor, split as evenly as it goes.

        Raises RejectedError where there are fewer samples than ranks, or something in the batch is no tensor of samples.

        >>> one = Ranks(rank=1, world=2, device=torch.device("cpu"))
        >>> one.part({"x": torch.arange(5), "scale": 2}, 5)
        {'x': tensor([3, 4]), 'scale': 2}
        """
        if length < self.world:
            msg = f"a batch must have a sample for every rank. Got {length} for {self.world}. Yield larger batches, or start fewer processes."
            raise RejectedError(msg)
        start, stop = self._bounds(length)

        def own(value: Any) -> Any:
            if isinstance(value, Mapping):  # those that pytree does not know, as a tokenizer's
                return {name: self.part(v, length) for name, v in value.items()}
            if value is None or isinstance(value, Number) or (isinstance(value, Tensor) and value.dim() == 0):
                return value
            if isinstance(value, Tensor | np.ndarray) and value.shape[0] == length:
                return value[start:stop]
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else type(value).__name__
            msg = f"a batch of {length} samples must hold tensors with the samples on axis 0, to be shared out. Got {got}."
            raise RejectedError(msg)

        return pytree.tree_map(own, batch)

    def weight(self, length: int) -> float:
        """What the loss of this rank's part counts: samples / mean samples of a rank; 1 where they are split evenly."""
        start, stop = self._bounds(length)
        return (stop - start) * self.world / length

    def _bounds(self, length: int) -> tuple[int, int]:
        least, more = divmod(length, self.world)
        start = self.rank * least + min(self.rank, more)
        return start, start + least + (self.rank < more)

    def mean(self, value: Tensor) -> float:
        """The mean of a number over all ranks: they decide alike by it."""
        total = value.detach().to(self.device, torch.float64).reshape(1).clone()
        torch.distributed.all_reduce(total)
        return float(total) / self.world

    @torch.no_grad()
    def share_buffers(self, module: nn.Module) -> None:
        """Give every rank the buffers of rank 0, in one message of bytes: gloo knows no int16, uint16 or float8."""
        buffers = [b for b in module.buffers() if b.numel()]
        if not buffers:
            return
        flat = torch.cat([b.contiguous().reshape(-1).view(torch.uint8) for b in buffers])
        torch.distributed.broadcast(flat, src=0)
        for buffer, values in zip(buffers, flat.split([b.numel() * b.element_size() for b in buffers]), strict=True):
            buffer.copy_(values.clone().view(buffer.dtype).view(buffer.shape))  # a copy begins where its dtype may

    def agree(self, what: str, digest: str, *, error: type[Exception] = VerificationError) -> None:
        """All ranks must have the same digest; they wait for each other here, and raise together."""
        own = torch.frombuffer(bytearray(hashlib.sha256(digest.encode()).digest()), dtype=torch.uint8).to(self.device)
        every = [torch.empty_like(own) for _ in range(self.world)]
        torch.distributed.all_gather(every, own)
        different = [str(rank) for rank, other in enumerate(every) if not torch.equal(other, every[0])]
        if different:
            msg = f"all ranks must have the same {what}. Got others at rank {', '.join(different)} than at rank 0 of {self.world}."
            raise error(msg)


def own_device(device: str) -> str:
    """ "cuda" is the GPU of this rank; any other name is taken as it is."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
