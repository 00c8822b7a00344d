"""Which models to try: torchvision's, and timm's by family, smallest first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from paredown.coverage.sweep import append_line, read_lines
from paredown.models import import_timm, import_torchvision

MOST_PARAMETERS = 100_000_000


def torchvision_models() -> list[str]:
    """All that torchvision builds, quantized variants aside; "torchvision:" before each name."""
    models = import_torchvision().models
    return [f"torchvision:{n}" for n in sorted(models.list_models()) if not n.startswith("quantized_")]


def timm_models(limit: int = 300, most_parameters: int = MOST_PARAMETERS, *, sizes: Path | None = None) -> list[str]:
    """The smallest member of every family (module) of timm first, then the next smallest of each, until `limit`.

    Sizes are counted on the meta device, without weights; members above `most_parameters` are left out. Building some 1,300
    models takes minutes: `sizes` is a file of JSON lines that keeps what was counted, for this version of timm.
    """
    timm: Any = import_timm()
    known = _known(sizes, timm.__version__)
    by_family: dict[str, list[tuple[int, str]]] = {}
    for family in timm.list_modules():
        for name in timm.list_models(module=family):
            if name not in known:
                known[name] = _parameters(timm, name)
                _note(sizes, {"timm": timm.__version__, "model": name, "parameters": known[name]})
            size = known[name]
            if size is not None and size <= most_parameters:
                by_family.setdefault(family, []).append((size, name))
    ranked = [sorted(members) for _, members in sorted(by_family.items())]
    out: list[str] = []
    for place in range(max((len(r) for r in ranked), default=0)):
        out += [f"timm:{r[place][1]}" for r in ranked if place < len(r)]
        if len(out) >= limit:
            break
    return out[: max(limit, len(ranked))]


def _known(sizes: Path | None, version: str) -> dict[str, int | None]:
    return {r["model"]: r["parameters"] for r in read_lines(sizes) if r.get("timm") == version and "parameters" in r}


def _note(sizes: Path | None, line: Mapping[str, Any]) -> None:
    if sizes is not None:
        append_line(sizes, line)


def _parameters(timm: object, name: str) -> int | None:
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)  # type: ignore[attr-defined]
    except Exception:  # some builders compute on values, which the meta device has none of
        return None
    return sum(int(p.numel()) for p in model.parameters())
