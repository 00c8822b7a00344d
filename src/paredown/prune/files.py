"""save and load: a pruned model as safetensors and JSON, rebuilt in the user's own class without unpickling."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save as save_bytes
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.couple.trace import trace
from paredown.errors import RejectedError, UsageError
from paredown.plan import Plan
from paredown.program import Inputs, capture
from paredown.prune.depth import identity_module, outermost, realise_without
from paredown.prune.factor_graph import empty_factor_graph
from paredown.prune.factor_module import realise_factor_module
from paredown.prune.graph import realise_graph
from paredown.prune.module import put_state, set_attributes, tensors
from paredown.prune.nouns import Pruned, Stage
from paredown.prune.removal import removal
from paredown.records import whole_file, write_text
from paredown.train.masks import check_zeros

WEIGHTS, PLAN, FORM = "model.safetensors", "plan.json", "form.json"


def save(pruned: Pruned, folder: str | Path) -> None:
    """Write model.safetensors, plan.json and form.json (realiser, attribute sizes, input shapes); each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_masks(folder, (pruned.plan, *(stage.plan for stage in pruned.stages)))
    write_text(folder / PLAN, pruned.plan.to_json())
    form = {
        "schema": 1,
        "realiser": pruned.realiser,
        "plan_digest": pruned.plan.digest,
        "attributes": {p: dict(v) for p, v in sorted(pruned.attributes.items())},
        "inputs": _described(pruned.program.inputs),
        "stages": [_stage_json(stage) for stage in pruned.stages],
    }
    write_text(folder / FORM, json.dumps(form, indent=1, sort_keys=True) + "\n")
    with whole_file(folder / WEIGHTS) as temporary:
        save_file(_own_tensors(pruned.module.state_dict()), temporary, metadata={"plan": pruned.plan.digest})


def load(folder: str | Path, model: nn.Module, inputs: Any = None) -> nn.Module:
    """The pruned model in the user's class: cut by the plan, sizes set, weights loaded strictly. `model` is not changed.

    Where only the graph realiser fitted, the model is captured again and rebuilt as a graph (`inputs` where the
    stored shapes are not enough: integer inputs with a meaning). Raises RejectedError where the files do not fit.

    >>> import paredown as pare                                       # doctest: +SKIP
    >>> model = pare.load("runs/digits", DigitsNet())                 # doctest: +SKIP
    """
    folder = Path(folder)
    form = _read_form(folder)
    bits = read_masks(folder)
    plan = Plan.from_json((folder / PLAN).read_text(encoding="utf-8"), bits)
    if plan.digest != form["plan_digest"]:
        msg = f"plan.json and form.json in {folder} must belong together. Got digests {plan.digest[:12]} and {form['plan_digest'][:12]}."
        raise RejectedError(msg)
    weights = load_file(folder / WEIGHTS)
    rebuilt = model
    for stage in _stages(form, plan, bits):
        rebuilt = _rebuilt(rebuilt, stage, inputs if inputs is not None else _example(form["inputs"]))
    try:
        rebuilt.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        msg = f"the weights in {folder} must fit {type(model).__name__} after the plan. {error}"
        raise RejectedError(msg) from error
    if plan.masks:
        check_zeros(rebuilt, plan.masks)
    return rebuilt.eval()


def write_masks(folder: Path, plans: Iterable[Plan]) -> None:
    """The bits of plans' masks in one file named by its content (uint8, eight weights each); older ones of the folder go."""
    every = {m.digest: m.bits for plan in plans for m in plan.masks.values() if m.bits}
    data = save_bytes({d: torch.frombuffer(bytearray(b), dtype=torch.uint8) for d, b in sorted(every.items())})
    name = f"masks-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    if every:
        with whole_file(folder / name) as temporary:
            Path(temporary).write_bytes(data)
    for old in folder.glob("masks-*.safetensors"):
        if not every or old.name != name:
            old.unlink()


def read_masks(folder: Path) -> dict[str, bytes]:
    """Bits by SHA-256, of all mask files in a folder; each is checked against its digest when a plan takes it."""
    bits: dict[str, bytes] = {}
    for file in sorted(folder.glob("masks-*.safetensors")):
        try:
            bits |= {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}
        except Exception as error:
            msg = f"{file.name} in {folder} must hold the masks of plan.json. Got {type(error).__name__}: the file is damaged."
            raise RejectedError(msg) from error
    return bits


def _stages(form: dict[str, Any], plan: Plan, bits: Mapping[str, bytes]) -> tuple[Stage, ...]:
    if not form.get("stages"):
        return (Stage(plan=plan, realiser=form["realiser"], attributes=form["attributes"]),)
    return tuple(
        Stage(
            plan=Plan.from_json(json.dumps(stage["plan"]), bits),
            realiser=stage["realiser"],
            attributes=_tuples(stage["attributes"]),
        )
        for stage in form["stages"]
    )


def _stage_json(stage: Stage) -> dict[str, Any]:
    attributes = {p: dict(v) for p, v in sorted(stage.attributes.items())}
    return {"plan": json.loads(stage.plan.to_json()), "realiser": stage.realiser, "attributes": attributes}


def _rebuilt(model: nn.Module, stage: Stage, inputs: Any) -> nn.Module:
    """A copy of a model with the structure that a stage gives it; its weights are not set."""
    plan = stage.plan
    if stage.realiser == "module":
        gone = outermost(plan.drop_modules)
        made = identity_module(model, gone) if gone else copy.deepcopy(model)
        if plan.keep:
            made = _cut(made, plan)
        set_attributes(made, {p: dict(v) for p, v in stage.attributes.items()})
        chained = realise_factor_module(made, plan.ranks) if plan.ranks else made
        if chained is None:
            msg = f"the layers with ranks must be torch's own nn.Linear and nn.Conv. Got others in {type(model).__name__}."
            raise RejectedError(msg)
        return chained
    if plan.drop_modules:
        model = realise_without(capture(model, inputs), plan.drop_modules)
    if plan.keep or not (plan.ranks or plan.drop_modules):
        program = capture(model, inputs)
        model = realise_graph(program, removal(trace(program), plan))
    return empty_factor_graph(capture(model, inputs), plan.ranks) if plan.ranks else model


def _read_form(folder: Path) -> dict[str, Any]:
    missing = [n for n in (WEIGHTS, PLAN, FORM) if not (folder / n).is_file()]
    if missing:
        msg = f"a pruned model must be a folder with {WEIGHTS}, {PLAN} and {FORM}. Got {folder} without {', '.join(missing)}."
        raise RejectedError(msg)
    form: dict[str, Any] = json.loads((folder / FORM).read_text(encoding="utf-8"))
    if form.get("schema") != 1:
        msg = f"form.json must have schema 1. Got {form.get('schema')!r}. A newer file needs a newer paredown."
        raise UsageError(msg)
    form["attributes"] = _tuples(form["attributes"])
    return form


def _tuples(attributes: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where torch's layers keep tuples."""
    return {p: {k: tuple(v) if isinstance(v, list) else v for k, v in a.items()} for p, a in attributes.items()}


def _cut(model: nn.Module, plan: Plan) -> nn.Module:
    """Slice a model's tensors by the plan, tied names together."""
    every = tensors(model)
    made: dict[int, Tensor] = {}
    by_id = {id(every[name]): axes for name, axes in plan.keep.items() if name in every}
    for tensor in every.values():
        cut = tensor.detach()
        for axis, kept in by_id.get(id(tensor), {}).items():
            cut = cut.index_select(axis, torch.tensor(kept))
        made[id(tensor)] = cut
    put_state(model, {name: made[id(tensor)] for name, tensor in every.items()})
    return model


def _own_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share nothing: safetensors refuses shared memory, so a tied name is written for itself."""
    seen: set[int] = set()
    out = {}
    for name, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        out[name] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    return out


def _described(inputs: Inputs) -> dict[str, Any]:
    leaves = pytree.tree_map(
        lambda t: (
            {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} if isinstance(t, Tensor) else None
        ),
        inputs,
    )
    return {"args": leaves[0], "kwargs": leaves[1]}


def _example(described: dict[str, Any]) -> dict[str, Any]:
    def made(value: Any) -> Any:
        if isinstance(value, dict) and set(value) == {"shape", "dtype"}:
            dtype = getattr(torch, value["dtype"])
            return torch.zeros(value["shape"], dtype=dtype)
        if isinstance(value, dict):
            return {k: made(v) for k, v in value.items()}
        return tuple(made(v) for v in value) if isinstance(value, list) else value

    return {"args": made(described["args"]), "kwargs": made(described["kwargs"])}
