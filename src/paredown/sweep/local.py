"""Local: the trials of a sweep on this machine. `run_missing` runs the cells without a result; `read_results` reads them.

Where they lie and what is noted: `trials`.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paredown.errors import ResourceError
from paredown.sweep.grid import Cell
from paredown.sweep.slots import PATIENCE_S, Slot, given_back, slot_for
from paredown.sweep.trials import (
    JOURNAL,
    RESULT,
    Event,
    Machine,
    Order,
    Outcome,
    key_of_trial,
    order_of,
    read_results,
    trial_folder,
    write_result,
)

__all__ = [
    "JOURNAL",
    "RESULT",
    "Event",
    "Machine",
    "Outcome",
    "Slot",
    "key_of_trial",
    "read_results",
    "run_missing",
    "trial_folder",
    "write_result",
]


def run_missing(
    cells: Sequence[Cell],
    folder: Path,
    versions: Mapping[str, Any],
    machine: Machine,
    *,
    retry: bool = False,
    progress: Callable[[Event], None] = lambda event: None,
) -> None:
    """Run every cell without a result, those first that others need; each in a process of its own, marked if it fails.

    Failed trials stay as they are, unless `retry`. The caller holds the folder's lock. Raises Interrupted (Ctrl-C; the
    same call goes on) and ResourceError (the journal cannot be written, or trials cannot be started).
    """
    with order_of(cells, folder, versions, machine, retry=retry, progress=progress) as order:
        sweep = _Sweep(order=order)
        try:
            sweep.run()
        finally:
            sweep.stop()


@dataclass(slots=True, kw_only=True)
class _Sweep:
    """The trials that run."""

    order: Order
    slots: list[Slot] = field(default_factory=list)

    def run(self) -> None:
        """Until nothing runs and nothing can begin."""
        with selectors.DefaultSelector() as selector:
            while self.order.ready or any(s.cell is not None for s in self.slots):
                self._start(selector)
                for key, _ in selector.select():
                    slot: Slot = key.data
                    for answer in slot.answers():
                        self._heard(slot, answer)
                        if answer.get("server"):
                            selector.unregister(key.fileobj)
                            self.slots.remove(slot)
                            slot.close()

    def stop(self) -> None:
        """End all processes, all of them within the same seconds, but for those that the next sweep may take."""
        until = time.monotonic() + PATIENCE_S
        busy = [slot for slot in self.slots if not given_back(slot)]
        for slot in busy:
            slot.leave()
        for slot in busy:
            slot.close(until - time.monotonic())

    def _start(self, selector: selectors.BaseSelector) -> None:
        order = self.order
        while order.ready:
            slot = next((s for s in self.slots if s.cell is None), None)
            if slot is None and len(self.slots) == order.machine.processes:
                return
            if slot is None:
                slot = self._new_slot(selector)
            cell = order.ready.popleft()
            slot.ask(cell, order.request(cell, order.folder))
            order.progress(Event(cell=cell, what="begins"))

    def _new_slot(self, selector: selectors.BaseSelector) -> Slot:
        number = min(set(range(len(self.slots) + 1)) - {s.number for s in self.slots})  # the GPU of one that ended
        try:
            slot = slot_for(self.order.machine, number)
        except OSError as error:
            msg = f"a process for trials must start. Got {error.strerror or error}. Use fewer --processes."
            raise ResourceError(msg) from error
        self.slots.append(slot)
        assert slot.process.stdout is not None
        selector.register(slot.process.stdout, selectors.EVENT_READ, slot)
        return slot

    def _heard(self, slot: Slot, answer: Mapping[str, Any]) -> None:
        cell = slot.cell
        if cell is None:
            return
        if "ended" not in answer:
            self.order.progress(Event(cell=cell, what="goes on", told=answer))
            return
        slot.cell = None
        self.order.ends(cell, answer, seconds=time.monotonic() - slot.began)
