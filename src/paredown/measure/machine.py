"""What machine the numbers come from: processor, instruction sets, cores, system. No host name, no user name."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

_INT8 = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "asimd", "asimddp", "i8mm", "sve")
"""Flags that decide how fast 8-bit products are; "vnni" and "dotprod" (asimddp) are the ones that matter."""


def machine() -> dict[str, Any]:
    """Processor, the instruction sets that matter for int8, cores, memory, system.

    {"cpu", "isa", "int8_dot", "cores", "memory_bytes", "system", "python"}; `int8_dot` says whether the processor
    multiplies and adds 8-bit numbers in one instruction (VNNI, AMX or dotprod): without it, int8 gains little.

    >>> machine()["cores"] >= 1
    True
    """
    info = _cpuinfo()
    flags = (info.get("flags") or info.get("Features") or "").split()
    isa = [f for f in _INT8 if f in flags]
    return {
        "cpu": info.get("model name") or info.get("Hardware") or platform.processor() or platform.machine(),
        "isa": isa,
        "int8_dot": bool({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"} & set(isa)),
        "cores": _cores(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def machine_text() -> str:
    """The same in one line, for `Measured.machine`."""
    facts = machine()
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {' '.join(facts['isa']) or 'no int8 flags known'}, {facts['system']}"
    )


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None  # the system does not say
