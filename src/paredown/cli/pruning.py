"""What a pruning plan and its result look like: tables for people, one document for scripts."""

from __future__ import annotations

import dataclasses
import json as jsonlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paredown.cli.show import emit, plan_table, share, show, table, units_left
from paredown.cli.sources import Loaded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from paredown.couple import Coupling
    from paredown.examine import Cost
    from paredown.plan import Plan
    from paredown.prune import Pruned
    from paredown.prune.sizes import Sizes

_ITEM_NAMES = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"}
_ITEM_NAMES |= {"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"}
_OF_LAYERS = ("dense_bytes", "bitmask_bytes", "csr_bytes", "n_m_bytes", "bsr_bytes", "gzip_bytes", "macs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was found out before anything changes, and how it is told."""

    found: Loaded
    coupling: Coupling
    cost: Cost
    plan: Plan
    granularity: str
    json: bool
    quiet: bool

    def already_met(self) -> int:
        """Exit 0, and it says so."""
        told = "The budget is already met: nothing was removed, nothing was written."
        if self.json:
            emit(
                {
                    **self._document(self.cost.parameters, self.cost.macs, None),
                    "already_met": True,
                    "notes": [told, *self._told()],
                }
            )
        else:
            show(told, *self._notes(), quiet=self.quiet)
        return 0

    def dry_run(self, counted: Cost | None, notes: tuple[str, ...]) -> int:
        """The plan as tables; counts are exact, the file was not made. `counted` where modules were left out on trial."""
        from paredown.allocate import foresee

        if counted is not None:
            parameters, macs, effective = counted.parameters, counted.macs, None
        else:
            seen = foresee(self.coupling, self.cost, self.plan)
            parameters, macs, effective = seen.parameters, seen.macs, seen.effective_macs
        if self.json:
            removed = [{"space": s.name, "units": [len(s), units_left(s, self.plan)]} for s in self.coupling.spaces]
            emit(
                {
                    **self._document(parameters, macs, None),
                    "dry_run": True,
                    "removed": removed,
                    "simulated": _foreseen(self.plan, macs, effective) if self.plan.masks else None,
                    "notes": [*self._told(), *notes],
                }
            )
        else:
            rows = [("parameters", self.cost.parameters, parameters), ("MACs", self.cost.macs, macs)]
            show(
                *self._tables(self.plan),
                *([_before_after(rows)] if counted is not None else []),
                *(f"note: {n}" for n in notes),
                *self._notes(),
                "Dry run: nothing was changed or written.",
                quiet=self.quiet,
            )  # fmt: skip
        return 0

    def done(self, level: Pruned, result: Pruned, out: Path, plot: Path | None) -> int:
        """What was reached, counted in the pruned model itself, with bytes of the file by stat.

        `level` is what this command did, `result` the same together with what --pruned brought.
        """
        import paredown
        from paredown.prune.form import WEIGHTS

        after = paredown.examine(paredown.capture(result.module, result.program.inputs, train=False))
        size = (out / WEIGHTS).stat().st_size
        sizes = paredown.mask_sizes(result) if result.plan.masks else None
        proof = result.proof
        if self.json:
            document = {
                **self._document(after.parameters, after.macs, size),
                "realiser": result.realiser,
                "proof": {
                    **{n: getattr(proof, n) for n in ("max_error", "scale", "moved", "mode")},
                    "shown": list(proof.shown),
                },
                "plan_digest": result.plan.digest,
                "out": str(out),
                "plot": None if plot is None else str(plot),
                "simulated": None if sizes is None else simulated(sizes),
                "masks": _described(result.plan),
                "fits": {n: {"before": f.before, "after": f.after} for n, f in level.fits.items()},
                "notes": [*self._told(), *level.notes],
            }
            emit(document)
            return 0
        dense = dense_file_bytes(self.found.program.module.state_dict(), result.plan.digest)
        rows = [("parameters", self.cost.parameters, after.parameters), ("MACs", self.cost.macs, after.macs)]
        show(
            *self._tables(level.plan),
            _before_after([*rows, ("file bytes", dense, size)]),
            f"proof: error {proof.max_error:.2g} at output scale {proof.scale:.2g} ({proof.mode}); realiser: {result.realiser}",
            *_answered(level),
            *([] if sizes is None else [f"Simulated. {sizes}"]),
            *self._notes(),
            *(f"note: {n}" for n in level.notes),
            *([] if plot is None else [f"wrote {plot}"]),
            f"wrote {out}",
            quiet=self.quiet,
        )
        return 0

    def _tables(self, plan: Plan) -> list[Any]:
        return plan_tables(self.coupling, self.cost, plan)

    def _document(self, parameters: int, macs: int, size: int | None) -> dict[str, Any]:
        """The keys that every form of the document has."""
        return {
            "schema": 1,
            "parameters": [self.cost.parameters, parameters],
            "macs": [self.cost.macs, macs],
            "file_bytes": [dense_file_bytes(self.found.program.module.state_dict(), self.plan.digest), size],
            "granularity": self.granularity,
            "masks": _described(self.plan),
            "simulated": None,
            "drop_modules": list(self.plan.drop_modules),
            "realiser": None,
            "proof": None,
            "plan_digest": self.plan.digest,
            "out": None,
            "plot": None,
            "weights": self.found.weights,
            "unknown_ops": dict(self.coupling.unknown_ops),
        }

    def _told(self) -> list[str]:
        """Notes for a script: of the model, and of ops without a rule, whose channels all stay."""
        unknown = [
            f"{op} has no coupling rule ({count} uses): all channels that reach it stay. `paredown couple` says where."
            for op, count in self.coupling.unknown_ops.items()
        ]
        return [*self.found.notes, *unknown]

    def _notes(self) -> list[str]:
        return [f"note: {n}" for n in self._told()]


def plan_tables(coupling: Coupling, cost: Cost, plan: Plan) -> list[Any]:
    """Channels by space and masks by weight, or the modules that are left out."""
    if plan.drop_modules:
        return [table(("module left out",), [(path,) for path in plan.drop_modules])]
    return [plan_table(coupling, cost, plan)]


def simulated(sizes: Sizes) -> dict[str, Any]:
    """The part of the document that says what masks are worth: bytes and MACs, each with its badge."""
    from paredown.prune.sizes import BADGES

    layers = [
        {
            **{n: getattr(layer, n) for n in ("name", "granularity", *_OF_LAYERS, "effective_macs")},
            "shape": list(layer.shape),
            "zeros": layer.num_zeros,
            "block": None if layer.block is None else list(layer.block),
        }
        for layer in sizes.layers
    ]
    return {
        "zeros": sum(layer.num_zeros for layer in sizes.layers),
        "of": sum(_product(layer.shape) for layer in sizes.layers),
        "macs": sizes.macs,
        "effective_macs": sizes.effective_macs,
        "dense_bytes": sizes.dense_bytes,
        "bitmask_bytes": sizes.bitmask_bytes,
        "best_bytes": sizes.best_bytes,
        "gzip_bytes": sizes.file_gzip_bytes,
        "badges": {**BADGES, "best_bytes": "estimated"},
        "layers": layers,
    }


def candidates_table(candidates: Any) -> Any:
    """Modules that may be left out, and what leaves with each."""
    rows = [(c.path, c.kind, f"{c.parameters:,}", f"{c.macs:,}") for c in candidates]
    return table(("may be left out", "class", "parameters", "MACs"), rows, left=2)


def candidates_document(candidates: Any) -> dict[str, Any]:
    """The same for scripts."""
    return {"schema": 1, "candidates": [dataclasses.asdict(c) for c in candidates]}


def dense_file_bytes(state: Mapping[str, Tensor], digest: str) -> int:
    """Bytes of the safetensors file that `save` would write for the dense model: header, padded to 8, and tensors.

    >>> import torch, safetensors.torch
    >>> state = {"a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.int64)}
    >>> dense_file_bytes(state, "0") == len(safetensors.torch.save(state, metadata={"plan": "0"}))
    True
    """
    header: dict[str, Any] = {"__metadata__": {"plan": digest}}
    at = 0
    for name in sorted(state, key=lambda n: (-state[n].element_size(), n)):
        tensor = state[name]
        kind = str(tensor.dtype).removeprefix("torch.")
        end = at + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": _ITEM_NAMES.get(kind, kind.upper()), "shape": shape, "data_offsets": [at, end]}
        at = end
    text = jsonlib.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + at


def _answered(level: Pruned) -> list[str]:
    """What an update gained, over all layers."""
    if not level.fits:
        return []
    before, after = (sum(getattr(f, n) for f in level.fits.values()) / len(level.fits) for n in ("before", "after"))
    return [
        f"update: error of a layer's outputs {before:.3g} → {after:.3g} of their spread (mean of {len(level.fits)})"
    ]


def _before_after(rows: list[tuple[str, int, int]]) -> Any:
    texts = [(name, f"{a:,}", f"{b:,}", share(b, a)) for name, a, b in rows]
    return table(("counted", "before", "after", "remains"), texts)


def _described(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "parameter": name,
            "granularity": mask.granularity,
            "shape": list(mask.shape),
            "kept": mask.num_kept,
            "of": _product(mask.shape),
        }
        for name, mask in plan.masks.items()
    ]


def _foreseen(plan: Plan, macs: int, effective: int | None) -> dict[str, Any]:
    """The same keys as `simulated`, before there is a model to measure."""
    described = _described(plan)
    return {
        "zeros": sum(m["of"] - m["kept"] for m in described),
        "of": sum(m["of"] for m in described),
        "macs": macs,
        "effective_macs": effective,
        **dict.fromkeys(("dense_bytes", "bitmask_bytes", "best_bytes", "gzip_bytes")),
        "badges": {"effective_macs": "estimated"},
        "layers": [],
    }


def _product(shape: Any) -> int:
    out = 1
    for n in shape:
        out *= int(n)
    return out
