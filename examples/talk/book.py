"""The book: every page built in turn, its result kept as JSON as soon as it is there, all of them bound into one HTML file.

`python -m talk.book OUT` builds what is missing in OUT and writes OUT/book.html; a killed run goes on there.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from newborn.rows import RECIPE, longer_folder

import paredown
from paredown.errors import Interrupted, ParedownError
from paredown.measure import machine_text
from paredown.pipeline.compress import versions
from paredown.records import locked, write_text
from paredown.report import figures
from paredown.report.wording import digits, whole
from talk.glossary import SOURCE as GLOSSARY
from talk.page import Setting, plain

PAGES = (
    "thirteen_models",
    "alexnet",
    "redundancy",
    "pruning_pictures",
    "which_zeros",
    "tiles",
    "pruning_recipe",
    "noise",
    "iterative",
    "adaptive",
    "low_rank",
    "from_scratch",
    "cast",
    "scale_and_zero_point",
    "quantization_recipe",
    "dynamic_static_qat",
    "examine",
    "case_study",
    "glossary",
    "later",
)
"""Modules of this folder, in the order of the book; each has build(setting) -> Page."""
LONG = 600.0
"""Seconds. A full page that took longer is kept where paredown's source has changed, until its version does."""


# ------------------------------------------------------------------------------------------------------------- building


def build(names: Sequence[str], setting: Setting, out: Path) -> dict[str, dict[str, Any]]:
    """The result of every page, {"name", "status": "done" | "failed", "seconds", "page" or "reason"}, kept in OUT/pages.

    A page is built again where what it depends on has changed since, or where it failed. A page that fails leaves
    its reason, and the others are built. What a page needs to go on from where it was killed lies in OUT/work.
    """
    results = {}
    for number, name in enumerate(names, 1):
        place, key = out / "pages" / f"{name}.json", _key(name, setting)
        there = _read(place)
        if there.get("key") == key and there.get("status") == "done" and _fresh(there):
            results[name] = there
            _say(f"[{number}/{len(names)}] {name}: there already")
            continue
        _say(f"[{number}/{len(names)}] {name} …")
        told = results[name] = {"name": name, "key": key, **_built(name, _placed(setting, out, name, key))}
        write_text(place, json.dumps(told, ensure_ascii=False, allow_nan=False))
        _say(
            f"    {told['status']} in {told['seconds']:.0f} s{': ' + told['reason'] if told['status'] != 'done' else ''}"
        )
        if told["status"] == "done":
            shutil.rmtree(_work(out, name, key))
    return results


def _work(out: Path, name: str, key: str) -> Path:
    return out / "work" / f"{name}-{key}"


def _placed(setting: Setting, out: Path, name: str, key: str) -> Setting:
    """The setting with folders that are there. They go by what they depend on: a checkpoint of another program never fits."""
    placed = dataclasses.replace(
        setting,
        folder=_work(out, name, key),
        shared=_work(out, "networks", _digest(_source("nets"), setting.quick, _installed(setting))),
    )
    for folder in (placed.folder, placed.shared):
        folder.mkdir(parents=True, exist_ok=True)
    return placed


def _built(name: str, setting: Setting) -> dict[str, Any]:
    start = (time.perf_counter(), _processor_seconds())
    try:
        page = plain(importlib.import_module(f"talk.{name}").build(setting))
        page = json.loads(json.dumps(page, allow_nan=False))  # a number that is none fails the page, not the book
        found = {"status": "done", "page": page}
    except Interrupted:
        raise
    except Exception as error:  # whatever a page raises is the page's, and is shown
        traceback.print_exc()
        found = {"status": "failed", "reason": f"{type(error).__name__}: {str(error) or 'no message'}"[:600]}
    return {
        **found,
        "seconds": time.perf_counter() - start[0],
        "processor_seconds": _processor_seconds() - start[1],
        "machine": machine_text(),
        "quick": setting.quick,
        "package": _package(),
        "source": _source(name),
    }


def _processor_seconds() -> float:
    """Of this process and of the ones that it waited for."""
    return sum(os.times()[:4])


def _key(name: str, setting: Setting) -> str:
    """What a result depends on, so that an old one is not taken for a new one."""
    programs = [_source(each) for each in (name, "nets", "draw", "timing", "page")]
    return _digest(*programs, setting.quick, str(setting.data), _installed(setting), _read_by(name, setting))


def _read_by(name: str, setting: Setting) -> list[Any]:
    """What a page reads beside the programs of this folder."""
    if name == "glossary":
        return [_text(GLOSSARY)]
    if name != "case_study":
        return []
    newborn = [_source(each, "newborn") for each in ("rows", "longer", "task", "scene")]
    return [_stamp(setting.newborn), *newborn, _text(RECIPE)]


def _installed(setting: Setting) -> list[Any]:
    """Versions, and for a quick book paredown's source: a full page may be hours of work (see `_fresh`)."""
    return [versions(), _package() if setting.quick else None]


def _fresh(there: Mapping[str, Any]) -> bool:
    """Whether a page was made by this source of paredown, or took so long that it is kept through changes of it."""
    return there.get("package") == _package() or there.get("seconds", 0) > LONG


@cache
def _package() -> str:
    """Of all .py files of the installed paredown."""
    folder = Path(paredown.__file__).parent
    return _digest(*((str(p.relative_to(folder)), _text(p)) for p in sorted(folder.rglob("*.py"))))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:  # whoever needs it says so
        return f"not readable: {error.strerror}"


def _digest(*told: Any) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _stamp(folder: Path | None) -> list[int]:
    """When the case study last wrote something: its page follows."""
    if folder is None:
        return []
    longer = longer_folder(folder).glob("*/result.json")
    files = [*folder.glob("journal.jsonl"), *folder.glob("recipe.yaml"), *sorted(longer)]
    return [f.stat().st_mtime_ns for f in files]


def _source(name: str, package: str = "talk") -> str:
    try:
        return inspect.getsource(importlib.import_module(f"{package}.{name}"))
    except Exception as error:  # it cannot even be imported: _built says why
        return f"# not readable: {type(error).__name__}"


def _read(place: Path) -> dict[str, Any]:
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------------------- binding


def bind(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The pages as one HTML file: no script, nothing fetched."""
    loader = FileSystemLoader([Path(__file__).parent, Path(figures.__file__).parent])
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"marked": marked, "cell": cell, "safe_svg": Markup}
    return env.get_template("book.html").render(
        results=[_ready(r) for r in results.values()], bars=bars, alignment=alignment,
        quick=any(r["quick"] for r in results.values()),
        machines=sorted({r["machine"] for r in results.values()}),
    )  # fmt: skip


def _ready(result: Mapping[str, Any]) -> dict[str, Any]:
    number = PAGES.index(result["name"]) + 1 if result["name"] in PAGES else 0
    title = result["page"]["title"] if result["status"] == "done" else result["name"].replace("_", " ")
    return {**result, "number": number, "title": title}


def marked(text: str) -> Markup:
    """Escaped text with **strong**, *emphasis* and `code` as HTML.

    >>> str(marked("a **b** *d* `<c>`"))
    'a <strong>b</strong> <em>d</em> <code>&lt;c&gt;</code>'
    """
    safe = str(escape(text))
    safe = re.sub(r"(?<![\w)`-])-(?=\d)", "−", safe)  # a minus, as in tables
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    safe = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", safe)
    return Markup(re.sub(r"(?<![\w*])\*(\w[^*]*)\*(?![\w*])", r"<em>\1</em>", safe))


def cell(value: Any, form: str = "") -> Markup:
    """One cell: a number as its column writes it, with its interval; "not tested" where there is none."""
    if value is None:
        return Markup('<span class="badge">not tested</span>')
    if isinstance(value, dict):
        main = cell(value["value"], form)
        if value["low"] is None or value["high"] is None:
            return main
        return Markup("{}<small>{} to {}</small>").format(main, cell(value["low"], form), cell(value["high"], form))
    if isinstance(value, str):
        return marked(value)
    if form:
        return escape(f"{value:{form}}".replace("-", "−"))
    return escape(whole(value) if isinstance(value, int) else digits(value))


def alignment(table: Mapping[str, Any]) -> list[str]:
    """The class of every column: "n" for numbers, "w" for words that want room, "" for other words."""
    found = []
    for values in zip(*table["rows"], strict=True):
        words = [v for v in values if isinstance(v, str) and not v[:1].isdigit()]
        wordy = len(words) > len(values) / 2
        found.append("n" if not wordy else "w" if max(map(len, words)) > 24 else "")
    return ["", *found[1:]]


def bars(column: int, table: Mapping[str, Any]) -> list[Markup]:
    """The bars of one column."""
    found = [row[column] for row in table["rows"]]
    values = [v["value"] if isinstance(v, dict) else v for v in found]
    top = max((v for v in values if isinstance(v, int | float)), default=0)
    return [Markup(figures.bar(v, top).markup) if isinstance(v, int | float) else Markup() for v in values]


# -------------------------------------------------------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> int:
    """Build and bind; 0 where every page is there, 1 where one failed, 130 where it was interrupted, 7 where OUT is in use."""
    parser = argparse.ArgumentParser(
        prog="scripts/book", description="Every table and figure of the talk, rebuilt as one HTML book."
    )
    parser.add_argument(
        "out", type=Path, help="folder for book.html and the results of its pages; an earlier run goes on there"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer seeds, epochs and points: under 15 minutes on two cores"
    )
    parser.add_argument(
        "--pages", nargs="+", choices=PAGES, default=PAGES, metavar="PAGE", help=f"only some: {', '.join(PAGES)}"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=_there("../shared/data"),
        help="folder with cifar10.npz and resnet20_cifar10.safetensors, for the book without --quick",
    )
    parser.add_argument(
        "--newborn",
        type=Path,
        default=_there("runs/newborn-curve"),
        help="results of `paredown curve examples/newborn/curve.yaml`, for the case study; where there are none it runs that sweep (some two hours of one core; with --quick three minutes)",
    )
    given = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)  # what is timed runs on one thread, and small networks train no faster on two
    data = None if given.quick else given.data
    setting = Setting(quick=given.quick, folder=given.out, shared=given.out, data=data, newborn=given.newborn)
    try:
        with warnings.catch_warnings():  # those of libraries about their own future, once for every copied graph
            warnings.simplefilter("ignore", FutureWarning)
            return _made(setting, [p for p in PAGES if p in given.pages], given.out)
    except (KeyboardInterrupt, Interrupted):
        _say("Interrupted. The same command goes on with this page.")
        return 130
    except ParedownError as error:
        _say(str(error))
        return error.exit_code


def _made(setting: Setting, names: Sequence[str], out: Path) -> int:
    """Build the pages, and bind them with those that are there; 1 where one failed."""
    busy = f"{out} must be free. Another run works there. Wait for it, or choose another folder."
    with locked(out / ".lock", writable=f"{out} must be writable", held=busy):
        found = build(names, setting, out)
        kept = {name: _read(out / "pages" / f"{name}.json") for name in PAGES if name not in found}
        every = {
            **{n: r for n, r in kept.items() if r.get("status") == "done" and r.get("quick") == setting.quick},
            **found,
        }
        book = out / "book.html"
        write_text(book, bind({name: every[name] for name in PAGES if name in every}))
    failed = [name for name, r in found.items() if r["status"] != "done"]
    _say(
        f"{book}: {len(every) - len(failed)} pages, {book.stat().st_size / 1e6:.2f} MB"
        + (f"; FAILED: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


def _there(path: str) -> Path | None:
    """A folder beside or in this checkout, where it exists."""
    found = Path(__file__).parents[2] / path
    return found if found.is_dir() else None


if __name__ == "__main__":
    sys.exit(main())
