"""The page: what the records say, put into page.html."""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paredown import records as journal
from paredown.errors import MissingError, RejectedError
from paredown.records import Record
from paredown.report import evidence, insight, layers, masks
from paredown.report.beside import BROKEN, Beside, found_beside, shown
from paredown.report.criteria import explained
from paredown.report.document import not_tested
from paredown.report.reading import View, block, entry, items, mapping, number, text, view
from paredown.report.searching import search_lines
from paredown.report.stages import HEADS, common_place, device_rows, stage_rows, twin_rows
from paredown.report.verdict import verdict_strip
from paredown.report.wording import mebibytes, megabytes, whole

MOST_BYTES = 1_000_000
"""Of a page. What of a neighbour would take it beyond is linked and not put into it."""


_PLAIN = frozenset(string.ascii_letters + string.digits + " ,.-")
"""Characters that a CSS string holds as they are."""


def render(records: list[Record], beside: Sequence[Beside] = ()) -> str:
    """The report of a run as one HTML page: no script, no fetching, at most 1 MB.

    Whatever a record lacks is shown as "not tested". `beside` are folders of the same task (`found_beside`): the first curve and the
    first sensitivity of the same network, data and target are part of the page, all of them are linked. Raises MissingError where Jinja2 is not installed, RejectedError
    where there are no records.

    >>> from paredown.records import Record
    >>> page = render([Record(cell={"stage": "dense", "title": "<script>"})])
    >>> "<script>" in page, "&lt;script&gt;" in page
    (False, True)
    """
    if not records:
        msg = "a report must have at least one record. Got 0. Run `paredown compress` into this folder first."
        raise RejectedError(msg)
    content = _content(view(records))
    same = [next((b for b in beside if b.kind == kind and not b.differs), None) for kind in ("curve", "sensitivity")]
    parts = {b.folder: part for b in same if b is not None and (part := _part(b)) is not None}
    embedded, why = [b for b in same if b is not None and b.folder in parts], ""
    while True:
        told = {**content, "embedded": [parts[b.folder] for b in embedded], **shown(beside, embedded, why)}
        page = str(_template().render(told))
        if not embedded or len(page.encode()) <= MOST_BYTES:
            return page
        embedded, why = embedded[:-1], "not in this file, which it would take beyond a megabyte"


def _part(one: Beside) -> dict[str, Any] | None:
    """The sections of a curve or a sensitivity, to stand in the page of a run; None where they cannot be made."""
    template = _template(f"{one.kind}_sections.html")
    import markupsafe  # comes with Jinja2

    if one.kind == "curve":
        from paredown.report.curves import content_of
    else:
        from paredown.report.sensitivity import content_of
    told = {"at": f"{one.kind}-", "of": f"{one.title}: ", "folder": one.name}
    try:
        sections = markupsafe.Markup(template.render({**content_of(one.records), **told}))  # escaped there already
    except BROKEN:
        return None  # the page of this run does not depend on it
    return {
        "kind": one.kind, "title": one.title, "name": one.name, "link": one.link, "brief": one.brief,
        "recipe": text(mapping(one.records[0].cell).get("recipe_digest"), 16), "sections": sections,
    }  # fmt: skip


@functools.cache
def _template(name: str = "page.html") -> Any:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        msg = "the report must have Jinja2. It is not installed. pip install 'paredown[report]'."
        raise MissingError(msg) from error
    loader = FileSystemLoader(Path(__file__).parent)
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters["breakable"] = _breakable
    env.globals["labels"] = _labels
    return env.get_template(name)


def _breakable(name: str) -> Any:
    """A name whose lines may break behind its dots: `blocks.0.down.weigh` and a lone t are hard to read on a phone."""
    import markupsafe  # comes with Jinja2

    return markupsafe.Markup(str(markupsafe.escape(name)).replace(".", ".<wbr>"))


def _labels(*heads: Sequence[str]) -> Any:
    """The heads of a table as its style, once: on a phone its rows are stacked, and each cell takes the one of its column from there."""
    import markupsafe  # comes with Jinja2

    told = [str(head) for part in heads for head in part]
    said = [
        f"--l{at}:'{''.join(c if c in _PLAIN else f'{chr(92)}{ord(c):x} ' for c in head)}'"
        for at, head in enumerate(told, 1)
    ]
    return markupsafe.Markup('style="{}"').format(";".join(said)) if told else ""


def write_report(folder: str | Path) -> Path:
    """Read records.jsonl of a run folder and write report.html beside it, whole or not at all; returns its path.

    A curve and a sensitivity of the same network and data, in this folder or beside it, become part of a run's page; pages of the
    same task are linked.

    Raises RejectedError (no journal, a line that is no record), MissingError (Jinja2), ResourceError (cannot write).
    """
    folder = Path(folder)
    records = read_records(folder)
    if records and mapping(records[0].cell).get("stage") == "curve":
        from paredown.report.curves import write_curve_report  # it computes: the page of a run needs no numpy

        return write_curve_report(folder, records, found_beside(folder, records))
    if records and mapping(records[0].cell).get("stage") == "sensitivity":
        from paredown.report.sensitivity import write_sensitivity_report

        return write_sensitivity_report(folder, records, found_beside(folder, records))
    path = folder / "report.html"
    journal.write_text(path, render(records, found_beside(folder, records)))
    return path


def read_run(folder: str | Path) -> View:
    """The records of a run folder, sorted. Raises RejectedError where there is no journal or a line is no record."""
    return view(read_records(folder))


def read_records(folder: str | Path) -> list[Record]:
    """The records of a run folder, as they stand there. Raises RejectedError as `read_run` does."""
    return _read(Path(folder) / "records.jsonl")


def _read(path: Path) -> list[Record]:
    if not path.is_file() and (path.parent / "journal.jsonl").is_file():
        msg = f"a report must have a records.jsonl. Got a sweep that has not ended at {path.parent}. Run `paredown curve` into it again: it continues."
        raise RejectedError(msg)
    if not path.is_file():
        msg = f"a report must have a records.jsonl. Got none at {path}. Run `paredown compress` into this folder first."
        raise RejectedError(msg)
    try:
        return journal.read(path)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        msg = f"every line of records.jsonl must be one record. Got {type(error).__name__} ({text(error)}) at {path}. Restore the file, or run again."
        raise RejectedError(msg) from error


def _content(run: View) -> dict[str, Any]:
    """Everything that the template names."""
    cell = mapping(run.records[0].cell)
    return {
        "task": _name(run) or text(cell.get("task")) or "model",
        "target": text(cell.get("target")) or "unknown target",
        "facts": _dense_facts(run),
        "verdict": verdict_strip(run),
        "warnings": run.warnings,
        "heads": [run.metric["label"] if h == "{metric}" else h for h in HEADS],
        "metric": run.metric,
        "stages": stage_rows(run),
        "place": common_place(run),
        "devices": device_rows(run),
        "stages_csv": _stages_csv(run),
        "twin": twin_rows(run),
        "layers": layers.layer_table(run),
        "removed": layers.removed_table(run),
        "reached": layers.reached_lines(run),
        "criteria": explained(text(mapping(entry(r, "reached")).get("criterion"), 40) for r in run.stages),
        "search": search_lines(run),
        "left_out": masks.left_out_lines(run),
        "masks": masks.masks_table(run),
        "pinned": layers.pinned_table(run),
        "bits": insight.bits_table(run),
        "changed": insight.changed_lines(run),
        "bias": insight.bias_lines(run),
        "noise": insight.noise_lines(run),
        "roof": insight.roofline(run),
        "lineage": insight.lineage(run),
        "floats": evidence.float_lines(run),
        "proofs": evidence.proof_lines(run),
        "checks": evidence.check_lines(run),
        "training": evidence.training_lines(run),
        "training_csv": evidence.training_csv(run),
        "snippet": _snippet(run),
        "normalisation": block(entry(run.verdict, "normalisation"), 2000),
        "input": _input(run),
        "provenance": evidence.provenance(run),
        "remarks": evidence.remarks(run),
        "not_tested": [
            *not_tested(run),
            *([] if run.twin or run.verdict else ["an equal-size dense network"]),
            *insight.not_looked(run),
        ],
        "estimates": evidence.estimates(run),
    }


def _name(run: View) -> str:
    """What the recipe calls itself; "" where it does not, and goes by its default."""
    name = text(entry(run.verdict, "name"))
    return "" if name in ("run", "notebook") else name


def _dense_facts(run: View) -> list[tuple[str, str]]:
    """Size of the dense model in a line."""
    facts = []
    for key, label in (("parameters", "parameters"), ("macs", "MACs")):
        value = number(entry(run.examine, key))
        if value is not None:
            facts.append((label, whole(value)))
            if key == "macs":
                facts.append(("FLOPs (2 × MACs)", whole(2 * value)))
    peak = number(entry(run.examine, "peak_activation_bytes"))
    if peak is not None:
        facts.append(("peak activations, estimated", f"{megabytes(peak)} ({mebibytes(peak)})"))
    return facts


def _snippet(run: View) -> str:
    """The example of the file that the page recommends: where speed overrules the verdict, that of `otherwise`."""
    overruled = run.recommended != entry(run.verdict, "recommended")
    return block(entry(run.verdict, "otherwise_snippet" if overruled else "snippet"))


def _input(run: View) -> str:
    given = entry(run.verdict, "input")
    if not mapping(given):
        return text(given) if not isinstance(given, list) else text(json.dumps(given, default=str))
    shape = "×".join(text(s, 12) for s in items(mapping(given).get("shape")))
    return f"{text(mapping(given).get('name'))} {shape}".strip()


def _stages_csv(run: View) -> str:
    """The before/after table for a spreadsheet: every figure of every stage with interval and badge."""
    from paredown.report.reading import figure, stage_name

    names = dict.fromkeys(str(k) for r in run.stages for k in mapping(r.measured))
    lines = []
    for record in run.stages:
        for name in names:
            found = figure(record, name)
            lines.append(
                [
                    stage_name(record),
                    text(name),
                    found.value,
                    found.low,
                    found.high,
                    found.n,
                    text(found.unit),
                    found.badge,
                ]
            )
    return layers.csv_link(("stage", "figure", "value", "low", "high", "n", "unit", "badge"), lines, layers.LARGE)
