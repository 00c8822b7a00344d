"""Reading records with patience: what is missing or malformed becomes None, "" or empty, never an exception."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paredown.records import Measured, Record
from paredown.report.wording import heading

_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
"""Control characters, line separators, half characters, and marks that turn the direction of text around."""
_MISSING = Measured(value=None, unit="", badge="not tested")
_LARGEST = 1e30
"""No figure of a network is larger; a journal that says so (or NaN) is broken there."""
DEVICE = "device-"
"""How the stages begin that were measured elsewhere: they are no rows of the before/after table."""
_BADGES = ("measured", "estimated", "not tested")


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The records of one run, sorted by what they are."""

    records: tuple[Record, ...]
    examine: Record | None
    verdict: Record | None
    stages: tuple[Record, ...]
    """Those with an exported file, in the order of the journal."""
    insight: Record | None = None
    """The closer look: for whom the result changed, noise per layer, the roofline."""
    devices: tuple[Record, ...] = ()
    """What `paredown measure --import --into` read back of other devices."""

    def stage(self, name: str | None) -> Record | None:
        """The stage of this name."""
        return next((r for r in self.stages if stage_name(r) == name), None)

    @property
    def recommended(self) -> str | None:
        """Name of the recommended stage, None while there is no verdict.

        The records name a file by size and metric alone, since timings differ from run to run. A file that is slower
        than the dense one beyond its interval is no improvement: then the verdict's `otherwise` stands in, unless that is slower, too.
        """
        named = text(entry(self.verdict, "recommended")) or None
        otherwise = text(entry(self.verdict, "otherwise")) or named
        in_codes = self.quantized is not None and named == stage_name(self.quantized)
        return otherwise if in_codes and self._is_slower(named) and not self._is_slower(otherwise) else named

    def _is_slower(self, name: str | None) -> bool:
        """Whether a stage's file is slower than the dense one beyond its interval."""
        speedup = figure(self.stage(name), "speedup")
        return speedup.high is not None and speedup.high < 1

    @property
    def quantized(self) -> Record | None:
        """The stage whose file is in codes: what the verdict names, else "int8"."""
        return self.stage(text(entry(self.verdict, "quantized")) or "int8")

    @property
    def twin(self) -> Record | None:
        """The stage of the equal-size dense network."""
        return next((r for r in self.stages if stage_name(r).startswith("twin-")), None)

    @property
    def metric(self) -> dict[str, str]:
        """Name, the same as a heading, unit and goal of the task's metric."""
        given = mapping(entry(self.verdict, "metric"))
        units = [figure(r, "metric").unit for r in self.stages]
        unit = text(given.get("unit"), 16) or next((u for u in units if u), "")
        goal = "min" if given.get("goal") == "min" else "max"
        name = text(given.get("name"), 60) or "metric"
        return {"name": name, "label": heading(name), "unit": unit, "goal": goal}

    @property
    def warnings(self) -> list[str]:
        """What was odd about data, an evaluation or a calibration, the first forty."""
        return [text(w, 500) for w in items(entry(self.verdict, "warnings"))[:40]]


def view(records: list[Record]) -> View:
    """Sort the records. Where a stage is there twice, the later one counts, in the place of the first."""
    by_name: dict[str, Record] = {}
    for record in records:
        by_name[stage_name(record)] = record
    others = tuple(r for name, r in by_name.items() if name not in ("examine", "verdict", "insight"))
    return View(
        records=tuple(by_name.values()),
        examine=by_name.get("examine"),
        verdict=by_name.get("verdict"),
        insight=by_name.get("insight"),
        stages=tuple(r for r in others if not stage_name(r).startswith(DEVICE)),
        devices=tuple(r for r in others if stage_name(r).startswith(DEVICE)),
    )


def stage_name(record: Record) -> str:
    """The stage's name, "unnamed" where the record has none."""
    return text(mapping(record.cell).get("stage")) or "unnamed"


def stage_title(record: Record) -> str:
    """What a person calls the stage."""
    return text(mapping(record.cell).get("title")) or stage_name(record)


def stage_of_device(run: View, record: Record) -> str | None:
    """The stage whose file ran on a device, by its SHA-256; where a file has several parts, by those of all."""
    sums = {text(v) for v in mapping(entry(record, "model")).values()}
    parts = {stage_name(r): {*map(text, items(entry(r, "digests")) or [entry(r, "digest")])} for r in run.stages}
    return next((name for name, own in parts.items() if own <= sums and any(own)), None)


def entry(record: Record | None, key: str) -> Any:
    """One entry of the details; None where there is no record or no entry."""
    return None if record is None else mapping(record.details).get(key)


def epoch_losses(record: Record) -> list[tuple[float, float]]:
    """(epoch, loss) of a training; an attempt that was rolled back has no loss and is no epoch."""
    found: list[tuple[float, float]] = []
    for one in items(entry(record, "history")):
        told = mapping(one)
        loss = number(told.get("loss") if told else one)
        if loss is not None:
            epoch = number(told.get("epoch"))
            found.append((len(found) + 1 if epoch is None else epoch, loss))
    return found


def figure(record: Record | None, key: str) -> Measured:
    """One measured figure. Missing, NaN or of an unknown badge: value None, badge "not tested"."""
    found = None if record is None else mapping(record.measured).get(key)
    if not isinstance(found, Measured):
        return _MISSING
    value = number(found.value)
    unit = text(found.unit, 16)
    if value is None or found.badge not in _BADGES or found.badge == "not tested":
        return dataclasses.replace(_MISSING, unit=unit)
    return dataclasses.replace(found, value=value, unit=unit, low=number(found.low), high=number(found.high))


def number(value: Any) -> float | int | None:
    """A finite number; whole ones as int, so that bytes and MACs stay exact."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    return value


def text(value: Any, longest: int = 160) -> str:
    """Text for one line: no control characters, at most `longest` characters (the middle gives way); "" for None."""
    if value is None:
        return ""
    line = _UNSAFE.sub("\ufffd", str(value)).replace("\n", " ").replace("\r", " ").strip()
    if len(line) <= longest:
        return line
    half = (longest - 1) // 2
    return f"{line[:half]}…{line[-half:]}"


def block(value: Any, longest: int = 20_000) -> str:
    """Text of several lines."""
    lines = _UNSAFE.sub("\ufffd", "" if value is None else str(value)).replace("\r\n", "\n")
    return lines if len(lines) <= longest else lines[:longest] + "\n…"


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def items(value: Any) -> list[Any]:
    """The value as a list: a list or tuple as it is, a lone value in a list, None as an empty one."""
    if value is None or value == "":
        return []
    if isinstance(value, list | tuple):
        return list(value)
    return [f"{k}: {v}" for k, v in value.items()] if isinstance(value, Mapping) else [value]


def rows(value: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list."""
    return [v for v in items(value) if isinstance(v, Mapping)] if not isinstance(value, Mapping) else [value]


def threads(record: Record) -> int | None:
    """How many threads the latency was measured with: as its protocol says, else as the environment does."""
    said = re.search(r"(\d+) threads?\b", text(figure(record, "latency_ms").protocol, 400))
    if said:
        return int(said.group(1))
    value = number(mapping(record.environment).get("threads"))
    return int(value) if value is not None else None


def runtime(record: Record) -> str:
    """The runtime that ran the file, with its version where that is known."""
    target = text(mapping(record.cell).get("target"))
    family = target.split("-")[0]
    version = text(mapping(mapping(record.environment).get("versions")).get(family))
    return f"{family} {version}".strip() or "unknown"
