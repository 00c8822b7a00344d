"""paredown coverage: which published models can be pruned, how far, and with what proof."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from paredown.cli import options
from paredown.cli.show import emit, only_document, say, show, table
from paredown.errors import MissingError, UsageError, VerificationError

if TYPE_CHECKING:
    from paredown.coverage import Row


def coverage(
    *models: Annotated[str, Parameter(help="MODEL strings; none: all of --family.")],
    family: Annotated[Literal["timm", "torchvision", "all"], Parameter(help="Where no models are named.")] = "all",
    limit: Annotated[int, Parameter(help="timm models at most: the smallest of every family first.")] = 300,
    channels: Annotated[float, Parameter(help="What remains of every space of channels, in (0, 1).")] = 0.5,
    onnx: Annotated[
        bool, Parameter(help="Export each pruned model and compare it in ONNX Runtime.", negative="")
    ] = False,
    seconds: Annotated[float, Parameter(help="Time of one model at most.")] = 120.0,
    memory: Annotated[str | None, Parameter(help="Memory of one model at most, as 16GB.")] = None,
    journal: Annotated[Path, Parameter(help="JSON lines; finished models there are not run again.")] = Path(
        "runs/coverage.jsonl"
    ),
    retry: Annotated[
        tuple[str, ...], Parameter(help="Run models of this status again, as error.", negative="", show_default=False)
    ] = (),
    out: Annotated[Path | None, Parameter(help="Write the table here, as Markdown.")] = None,
    threads: options.Threads = 1,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Capture, couple, cut and prove each model in a process of its own; resumable; exit 6 where a result is unproven."""
    from paredown.budget import parse_bytes
    from paredown.coverage import Limits, counts, markdown, sweep
    from paredown.coverage.zoo import timm_models, torchvision_models
    from paredown.records import write_text

    if limit < 1 or seconds <= 0:
        msg = f"--limit must be ≥ 1 and --seconds > 0. Got {limit} and {seconds}."
        raise UsageError(msg)
    bytes_ = parse_bytes(memory, "--memory") if memory is not None else None
    with only_document(json):
        chosen = list(models)
        if not chosen and family in ("torchvision", "all"):
            chosen += torchvision_models()
        if not chosen or (not models and family in ("timm", "all")):
            say("list timm's models", quiet=quiet or json)
            chosen += timm_models(limit, sizes=journal.with_name("timm-sizes.jsonl"))
        rows = sweep(
            chosen,
            channels=channels,
            export=onnx,
            limits=Limits(seconds=seconds, memory_bytes=bytes_),
            journal=journal,
            threads=threads or 1,
            retry=retry,
            progress=lambda row, n: say(f"{n + 1}/{len(chosen)} {_told(row)}", quiet=quiet or json),
        )
        if out is not None:
            write_text(out, markdown(rows))
    total = counts(rows)
    if json:
        emit({"schema": 1, "counts": total, "rows": [dict(r) for r in rows]})
    else:
        shown = table(("", "models"), list(total.items()))
        show(shown, *([f"wrote {out}"] if out is not None else []), quiet=quiet)
    _refuse(rows)
    return 0


def _refuse(rows: Sequence[Row]) -> None:
    """What is no result of the sweep but a failure of it."""
    unproven = [str(r["model"]) for r in rows if r["status"] == "unproven"]
    if unproven:
        msg = f"every pruned model must be proven. Got {len(unproven)} without a proof: {', '.join(unproven[:10])}."
        raise VerificationError(msg)
    from paredown.coverage.table import disagreeing

    wrong = disagreeing(rows)
    if wrong:
        msg = f"every exported file must answer as its pruned model. Got {len(wrong)} that do not: {', '.join(wrong[:10])}."
        raise VerificationError(msg)
    for kind in (UsageError, MissingError):
        start = f"{kind.__name__}: "
        said = [
            str(r["message"]).removeprefix(start)
            for r in rows
            if str(r.get("message", "")).startswith(start) and "total_parameters" not in r
        ]
        if said:
            more = f" And {len(said) - 1} more like it." if len(said) > 1 else ""
            raise kind(said[0] + more)


def _told(row: Row) -> str:
    removed: Any = row.get("removed")
    gone = f", {100 * removed:.0f} % of the parameters removed" if removed is not None else ""
    return f"{row['model']}: {row['status']}{gone}, {row.get('seconds', 0):.0f} s {row.get('message', '')}".strip()
