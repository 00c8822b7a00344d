"""save and load: a pruned model as safetensors and JSON, rebuilt in the user's own class without unpickling."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

from paredown.couple.trace import lockstep, trace
from paredown.errors import RejectedError, UsageError, must_be
from paredown.plain import plain_copy
from paredown.plan import Plan
from paredown.program import Program, capture
from paredown.prune.depth import identity_module, outermost, realise_without
from paredown.prune.factor_graph import empty_factor_graph
from paredown.prune.factor_module import realise_factor_module
from paredown.prune.form import (
    FORM,
    PLAN,
    WEIGHTS,
    described,
    example_of,
    fit_attributes,
    proof_of,
    read_form,
    read_tensors,
    read_text,
)
from paredown.prune.graph import realise_graph
from paredown.prune.module import put_state, set_attributes, tensors
from paredown.prune.nouns import Fit, Pruned, Stage
from paredown.prune.removal import Removal, removal
from paredown.records import whole_file, write_text
from paredown.train.masks import check_zeros


def save(pruned: Pruned, folder: str | Path) -> None:
    """Write model.safetensors, plan.json and form.json (realiser, attribute sizes, inputs, proof, notes); each whole or not at all.

    Saving over a folder may be interrupted: what is then in it is the old model, or is refused by `load`.

    Raises ResourceError where the disk is full, and UsageError where `pruned` is something else, or `folder` a file.
    """
    must_be("pruned", pruned, Pruned, fix="Use paredown.prune(program, plan).")
    folder = Path(folder)
    if folder.is_file():
        msg = f"a pruned model must be saved to a folder. Got the file {folder}."
        raise UsageError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    masks = write_masks(folder, (pruned.plan, *(stage.plan for stage in pruned.stages)))
    # Before the plan that says how they are read: between the two, their digests differ.
    with whole_file(folder / WEIGHTS) as temporary:
        save_file(_own_tensors(pruned.module.state_dict()), temporary, metadata={"plan": pruned.plan.digest})
    write_text(folder / PLAN, pruned.plan.to_json())
    form = {
        "schema": 1,
        "realiser": pruned.realiser,
        "plan_digest": pruned.plan.digest,
        "attributes": {p: dict(v) for p, v in sorted(pruned.attributes.items())},
        "inputs": described(pruned.program.inputs),
        "stages": [_stage_json(stage) for stage in pruned.stages],
        "proof": dataclasses.asdict(pruned.proof),
        "notes": list(pruned.notes),
        "fits": {name: dataclasses.asdict(fit) for name, fit in sorted(pruned.fits.items())},
    }
    write_text(folder / FORM, json.dumps(form, indent=1, sort_keys=True) + "\n")
    for old in folder.glob("masks-*.safetensors"):
        if old.name != masks:
            old.unlink()


def load(folder: str | Path, model: nn.Module, inputs: Any = None) -> nn.Module:
    """The pruned model in the user's class: cut by the plan, sizes set, weights loaded strictly. `model` is not changed.

    Parametrizations, weight and spectral norm of the class are folded into plain weights, as capture does. Where only the graph realiser fitted, the model is captured again and rebuilt as a graph (`inputs` where the
    stored ones are not enough: integer inputs with a meaning). Raises RejectedError where the files do not fit, in dtypes as well.

    >>> import paredown as pare                                       # doctest: +SKIP
    >>> model = pare.load("runs/digits", DigitsNet())                 # doctest: +SKIP
    """
    folder = Path(folder)
    return _loaded(folder, _read(folder), model, inputs)


def load_pruned(folder: str | Path, program: Program) -> Pruned:
    """What `save` wrote, as a result that goes on: recover and keep_masks hold its masks, and later levels compose.

    `program` is the dense model, captured; its weights do not matter, those of the folder count. Raises RejectedError
    where the files do not fit.

    >>> import tempfile; from paredown.plan import Mask; from paredown.prune import compose, prune
    >>> net, kept = nn.Linear(4, 4), torch.eye(4).bool().numpy()
    >>> program = capture(net, torch.zeros(2, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(prune(program, Plan(keep={}, masks={"weight": Mask.of(kept, "element")})), folder)
    ...     load_pruned(folder, program).plan.masks["weight"].density
    0.25
    """
    must_be("program", program, Program, fix="Use paredown.capture(model, inputs).")
    folder = Path(folder)
    read = _read(folder)
    return Pruned(
        module=_loaded(folder, read, program.module, program.inputs),
        program=program,
        plan=read.plan,
        realiser=read.form["realiser"],
        proof=proof_of(read.form, folder),
        attributes=read.form["attributes"],
        stages=read.stages if read.form["stages"] else (),
        notes=tuple(read.form["notes"]),
        fits={name: Fit(**fit) for name, fit in read.form["fits"].items()},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A folder's JSON, checked."""

    form: dict[str, Any]
    plan: Plan
    stages: tuple[Stage, ...]


def _read(folder: Path) -> _Read:
    form = read_form(folder)
    bits = read_masks(folder)
    try:
        plan = Plan.from_json(read_text(folder / PLAN), bits)
        stages = _stages(form, plan, bits)
    except UsageError as error:
        msg = f"{PLAN} in {folder} must be as it was written. {error}"
        raise RejectedError(msg) from error
    if plan.digest != form["plan_digest"]:
        msg = f"plan.json and form.json in {folder} must belong together. Got digests {plan.digest[:12]} and {form['plan_digest'][:12]}."
        raise RejectedError(msg)
    return _Read(form=form, plan=plan, stages=stages)


def _loaded(folder: Path, read: _Read, model: nn.Module, inputs: Any) -> nn.Module:
    weights = read_tensors(folder / WEIGHTS)
    wanted = read.form["plan_digest"]
    written = weights.metadata.get("plan", wanted)  # folders of before there was any
    if written != wanted:
        msg = f"{WEIGHTS} and {FORM} in {folder} must belong together. Got digests {written[:12]} and {wanted[:12]}: saving was interrupted. Save the model again."
        raise RejectedError(msg)
    device = next((p.device for p in model.parameters()), torch.device("cpu")) if isinstance(model, nn.Module) else None
    rebuilt, _ = plain_copy(model)  # as capture took it: weights that a layer computes are plain ones in the file
    _refuse_casts(rebuilt, weights, folder, type(model).__name__)
    for stage in read.stages:
        if inputs is None and stage.realiser == "graph":
            inputs = example_of(read.form["inputs"])
        rebuilt = _rebuilt(rebuilt, stage, inputs)
    _refuse_casts(rebuilt, weights, folder, type(model).__name__)  # what the stages made: factors
    try:
        rebuilt.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        msg = f"the weights in {folder} must fit {type(model).__name__} after the plan. {error}"
        raise RejectedError(msg) from error
    if read.plan.masks:
        check_zeros(rebuilt, read.plan.masks)
    return rebuilt.to(device).eval()


def _refuse_casts(model: nn.Module, weights: Mapping[str, Tensor], folder: Path, name: str) -> None:
    """load_state_dict would round the stored numbers to the model's dtypes in silence, or compute in others than were saved."""
    state = model.state_dict()
    wrong = [n for n, t in state.items() if n in weights and isinstance(t, Tensor) and t.dtype != weights[n].dtype]
    if wrong:
        first, stored = wrong[0], weights[wrong[0]].dtype
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        fix = f"{name}().to({stored})" if stored.is_floating_point else "the class the model was pruned from"
        msg = (
            f"the weights in {folder} must have the dtypes of the model. Got {first} of {_dtype(stored)} for {_dtype(state[first].dtype)}"
            f"{more}. Pass {fix}."
        )
        raise RejectedError(msg)


def _dtype(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def write_masks(folder: Path, plans: Iterable[Plan]) -> str | None:
    """The bits of plans' masks in one file (uint8, eight weights each); its name, by its content, or None where there are none."""
    every = {m.digest: m.bits for plan in plans for m in plan.masks.values() if m.bits}
    if not every:
        return None
    data = save_bytes({d: torch.frombuffer(bytearray(b), dtype=torch.uint8) for d, b in sorted(every.items())})
    name = f"masks-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    with whole_file(folder / name) as temporary:
        temporary.write_bytes(data)
    return name


def read_masks(folder: Path) -> dict[str, bytes]:
    """Bits by SHA-256, of all mask files in a folder; each is checked against its digest when a plan takes it."""
    bits: dict[str, bytes] = {}
    for file in sorted(folder.glob("masks-*.safetensors")):
        try:
            bits |= {name: tensor.numpy().tobytes() for name, tensor in read_tensors(file).items()}
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
            attributes=stage["attributes"],
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
        fit_attributes(made, stage.attributes)
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
        model = realise_graph(program, _fitting(program, plan))
    return empty_factor_graph(capture(model, inputs), plan.ranks) if plan.ranks else model


def _fitting(program: Program, plan: Plan) -> Removal:
    """The plan laid over the program; folders from before tables stayed whole cut rotary pairs."""
    try:
        return removal(trace(program), plan)
    except UsageError:
        run = lockstep(program)
        if run is None:
            raise
        return removal(run, plan)


def _cut(model: nn.Module, plan: Plan) -> nn.Module:
    """Slice a model's tensors by the plan, tied names together."""
    every = tensors(model)
    made: dict[int, Tensor] = {}
    by_id = {id(every[name]): axes for name, axes in plan.keep.items() if name in every}
    for tensor in every.values():
        cut = tensor.detach()
        for axis, kept in by_id.get(id(tensor), {}).items():
            if axis >= cut.dim() or kept[-1] >= cut.shape[axis]:
                msg = f"the plan must index the model's own tensors. Got index {kept[-1]} along axis {axis} of one with shape {tuple(cut.shape)}. Pass the class the model was pruned from."
                raise RejectedError(msg)
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
