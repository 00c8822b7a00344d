"""Channel ids: a vectorised union-find, and id tensors that have the shape of the activation they describe.

An id tensor is int64 with the activation's own shape. 0 means "fixed: no channel that could leave". Axes along which
ids do not vary have stride 0, so that a [2, 512, 28, 28] activation costs 512 numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paredown.couple.space import Indices

FIXED = 0


class IdForest:
    """Union-find over channel ids. The root of a class is its smallest id; 0 is the root of nothing but itself."""

    def __init__(self) -> None:
        self._parent: Indices = np.zeros(1 << 12, dtype=np.int64)
        self._origin: NDArray[np.int32] = np.zeros(1 << 12, dtype=np.int32)
        self.size = 1
        self._starts = [0]
        """First id of each origin."""

    def fresh(self, count: int) -> Tensor:
        """New ids of one common origin (one parameter axis). Shape [count]."""
        end = self.size + count
        while end > len(self._parent):
            self._parent = np.concatenate([self._parent, np.zeros_like(self._parent)])
            self._origin = np.concatenate([self._origin, np.zeros_like(self._origin)])
        self._origin[self.size : end] = len(self._starts)
        self._starts.append(self.size)
        self._parent[self.size : end] = np.arange(self.size, end)
        self.size = end
        return torch.arange(end - count, end)

    @property
    def next_origin(self) -> int:
        """The origin number that the next fresh ids get."""
        return len(self._starts)

    def origins(self, ids: Tensor) -> Tensor:
        """The origin number of each id, 0 for fixed ones. Same shape."""
        return torch.from_numpy(self._origin[ids.numpy()])

    def whole(self, ids: Tensor) -> bool:
        """Whether these are all channels of every parameter axis that they come from: no slice of them."""
        mine = np.unique(self.find(np.unique(compact(ids).numpy())))
        ends = [*self._starts[1:], self.size]
        origins = [o for o in np.unique(self._origin[mine]).tolist() if o]
        return all(np.isin(self.find(np.arange(self._starts[o], ends[o])), mine).all() for o in origins)

    def find(self, ids: Indices) -> Indices:
        """The root of every id. Same shape."""
        root = self._parent[ids]
        while True:
            above = self._parent[root]
            if np.array_equal(above, root):
                self._parent[ids] = root
                return root
            root = above

    def canon(self, ids: Tensor) -> Tensor:
        """Ids replaced by their roots; axes along which they are then constant get stride 0."""
        small = compact(ids)
        roots = torch.from_numpy(self.find(np.array(small.numpy(), order="C").ravel()))
        return tidy(roots.reshape(small.shape)).expand(ids.shape)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Put a[i] and b[i] in one class wherever neither is fixed. Shapes broadcast."""
        x, y = (np.ascontiguousarray(t.numpy()).ravel() for t in torch.broadcast_tensors(a, b))
        both = (x > 0) & (y > 0)
        x, y = self.find(x[both]), self.find(y[both])
        while True:
            differ = x != y
            if not differ.any():
                return
            low, high = np.minimum(x[differ], y[differ]), np.maximum(x[differ], y[differ])
            # Several lows may claim one high; the last wins, the others are still unequal and come round again.
            self._parent[high] = low
            x, y = self.find(low), self.find(high)

    def snapshot(self) -> Indices:
        """All ties so far, for restore."""
        return self._parent.copy()

    def restore(self, snapshot: Indices) -> None:
        """Forget the ties made since the snapshot; no ids may have been made since."""
        self._parent = snapshot

    def roots(self) -> Indices:
        """The root of every id ever made, indexed by id."""
        return self.find(np.arange(self.size))


def compact(ids: Tensor) -> Tensor:
    """The same ids with every stride-0 axis narrowed to length 1."""
    for axis in range(ids.dim()):
        if ids.shape[axis] > 1 and ids.stride(axis) == 0:
            ids = ids.narrow(axis, 0, 1)
    return ids


def tidy(ids: Tensor) -> Tensor:
    """The same ids with stride 0 on every axis along which they are constant."""
    shape, small = ids.shape, compact(ids)
    for axis in range(small.dim()):
        if small.shape[axis] > 1:
            first = small.narrow(axis, 0, 1)
            if bool((small == first).all()):
                small = first
    return small.expand(shape)


def varying(ids: Tensor) -> list[int]:
    """Axes along which a tidy id tensor varies."""
    return [a for a in range(ids.dim()) if ids.shape[a] > 1 and ids.stride(a) != 0]


def fixed(shape: Any) -> Tensor:
    """An id tensor without any channel."""
    return torch.zeros((), dtype=torch.int64).expand(tuple(shape))


def along(ids: Tensor, axis: int) -> Tensor:
    """The ids of a vector, laid along one axis of `ids`' shape: first index of every other axis. Shape [length]."""
    return ids.movedim(axis, 0).reshape(ids.shape[axis], -1)[:, 0]


def laid(vector: Tensor, axis: int, shape: Any) -> Tensor:
    """A vector of ids as an id tensor of `shape` that varies along `axis` only."""
    view = [1] * len(shape)
    view[axis] = -1
    return vector.reshape(view).expand(tuple(shape))
