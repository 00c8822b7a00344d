"""Calibration: samples through the observers of a prepared graph, and what is odd about those samples."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from paredown.errors import RejectedError
from paredown.program import Inputs, Program
from paredown.quantize.batches import Batches, each, finite_rows, length, rows, tensors_of
from paredown.quantize.memory import Estimate, known_total
from paredown.quantize.ranges import beside_training, range_of, raw_pixels
from paredown.quantize.spread import Spread

FEW = 32
"""Below this many samples, activation ranges depend on the draw."""


def run_samples(
    prepared: fx.GraphModule,
    calibrate: Batches,
    num_samples: int | None,
    program: Program,
    kept: list[Inputs] | None = None,
    repair: Sequence[str] = (),
) -> tuple[tuple[str, ...], tuple[float, float]]:
    """Run the samples through the observers; returns what was odd about them, and their range. `kept` receives them, for `repair`.

    Raises RejectedError where there are none, or they do not fit the network; ResourceError where what a repair keeps of them
    would not fit in memory.
    """
    with Spread(prepared, FEW) as spread:
        notes, found = _through(prepared, calibrate, num_samples, program, kept, repair, spread)
    return (*notes, *filter(None, (spread.told(),))), found


def _through(
    prepared: fx.GraphModule,
    calibrate: Batches,
    num_samples: int | None,
    program: Program,
    kept: list[Inputs] | None,
    repair: Sequence[str],
    spread: Spread,
) -> tuple[tuple[str, ...], tuple[float, float]]:
    seen: dict[str, int] = collections.Counter()
    digests: set[bytes] = set()
    estimate: Estimate | None = None
    found = _Range()
    for args, kwargs in each(calibrate):
        batch: Any = (args, kwargs)
        if num_samples is not None and program.batch == "dynamic":
            batch = rows(batch, slice(0, num_samples - seen["used"]))
        batch = _only_finite(batch, seen, program)
        size = length(batch)
        if size:
            spread.expect(size)
            try:
                with torch.no_grad():
                    prepared(*batch[0], **batch[1])
            except Exception as error:
                shapes = ", ".join(str(tuple(t.shape)) for t in tensors_of(batch))
                msg = f"calibration batches must fit the network's inputs. Got {shapes}: {str(error).strip().splitlines()[0][:200]}."
                raise RejectedError(msg) from error
            if not seen["used"]:
                found.beside_training = beside_training(program, batch)
            found.see(batch)
            seen["used"] += size
            if kept is not None:
                estimate = estimate or Estimate(prepared, batch, repair, known_total(calibrate, num_samples))
                estimate.refuse_more(seen["used"])
                kept.append(batch)
            _remember(batch, seen, digests)
        if num_samples is not None and seen["used"] >= num_samples:
            break
    if not seen["used"]:
        got = f"{seen['bad']} samples, all with NaN or infinity" if seen["bad"] else "0 batches"
        msg = f"calibration must have at least one sample. Got {got}. Pass inputs like those the network will see."
        raise RejectedError(msg)
    memory = () if estimate is None else (estimate.told(seen["used"]),)
    return (*_oddities(seen, len(digests)), *found.told(), *memory), found.range


class _Range:
    """What the values themselves say of the samples: of which kind of data they are."""

    def __init__(self) -> None:
        self.beside_training = ""
        self.range, self._raw = range_of(()), True

    def see(self, batch: Inputs) -> None:
        """One more batch."""
        tensors = tensors_of(batch)
        self.range = range_of(tensors, self.range)
        self._raw = self._raw and raw_pixels(tensors)

    def told(self) -> Iterator[str]:
        """In sentences."""
        if self.beside_training:
            yield self.beside_training
        if self._raw:
            low, high = self.range
            yield (
                f"calibration inputs are whole numbers from {low:g} to {high:g}, as of pictures that were not normalised: right only where the "
                "network scales them itself"
            )


def _only_finite(batch: Inputs, seen: dict[str, int], program: Program) -> Inputs:
    good = finite_rows(batch)
    if bool(good.all()):
        return batch
    seen["bad"] += int((~good).sum())
    return rows(batch, good if program.batch == "dynamic" else slice(0, 0))  # type: ignore[no-any-return]


def _remember(batch: Inputs, seen: dict[str, int], digests: set[bytes]) -> None:
    """Count the samples that are constant: one value in each of their inputs (a single number is no such input)."""
    inputs = [t for t in tensors_of(batch) if t.dim() and t.shape[0] == length(batch)]
    for i in range(length(batch) if inputs else 0):
        sample = [t[i].reshape(-1) for t in inputs]
        digest = hashlib.blake2b(digest_size=8)
        for values in sample:
            digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
        digests.add(digest.digest())
        wide = [v for v in sample if v.numel() > 1]
        seen["constant"] += bool(wide) and all(bool((v == v[0]).all()) for v in wide)


def _oddities(seen: dict[str, int], distinct: int) -> Iterator[str]:
    used = seen["used"]
    if seen["bad"]:
        yield f"calibration: {seen['bad']} samples with NaN or infinity were left out"
    if used < FEW:
        yield f"calibration: only {used} samples; below {FEW} the ranges depend on the draw"
    if distinct == 1 and used > 1:
        yield f"calibration: all {used} samples are identical"
    elif 0 < distinct < used:
        yield f"calibration: {used - distinct} of {used} samples are repetitions"
    if seen["constant"]:
        yield f"calibration: {seen['constant']} of {used} samples are constant (one value everywhere)"
