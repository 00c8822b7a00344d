"""form.json: how a saved model is rebuilt. Read as what a stranger may have written: sizes only, nothing that runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paredown.errors import RejectedError, UsageError
from paredown.program import Inputs
from paredown.prune.nouns import Proof
from paredown.weights import Weights, read_weights

WEIGHTS, PLAN, FORM = "model.safetensors", "plan.json", "form.json"
MOST_TEXT_BYTES = 256 * 2**20
MOST_INPUT_ELEMENTS = 2**31
"""Of one example input that is made from a described shape."""
_LIST, _DICT, _VALUE, _OTHER = "<list>", "<dict>", "<value>", "<other>"
_PLAIN = (bool, int, float, str, type(None))
_DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.complex128),
    )
}


def read_form(folder: Path) -> dict[str, Any]:
    """The content of form.json, checked; raises RejectedError where a file is missing or holds something else."""
    missing = [n for n in (WEIGHTS, PLAN, FORM) if not (folder / n).is_file()]
    if missing:
        msg = f"a pruned model must be a folder with {WEIGHTS}, {PLAN} and {FORM}. Got {folder} without {', '.join(missing)}."
        raise RejectedError(msg)
    text = read_text(folder / FORM)
    try:
        form = json.loads(text)
    except (ValueError, RecursionError) as error:
        msg = f"{FORM} in {folder} must be JSON. Got {type(error).__name__}: the file is damaged."
        raise RejectedError(msg) from error
    if not isinstance(form, dict):
        msg = f"{FORM} in {folder} must be a JSON object. Got a {type(form).__name__}."
        raise RejectedError(msg)
    if form.get("schema") != 1:
        msg = f"form.json must have schema 1. Got {form.get('schema')!r}. A newer file needs a newer paredown."
        raise UsageError(msg)
    wrong = [what for what, holds in _rules(form).items() if not holds]
    if wrong:
        msg = f"{FORM} in {folder} must hold {wrong[0]}. Got something else: the file was edited or damaged."
        raise RejectedError(msg)
    return {
        **form,
        "attributes": tuples(form["attributes"]),
        "notes": form.get("notes", []),  # folders of before there were any
        "fits": form.get("fits", {}),
        "stages": [{**s, "attributes": tuples(s["attributes"])} for s in form.get("stages") or ()],
    }


def read_text(path: Path) -> str:
    """A text file of a stranger: UTF-8, of a bounded size; raises RejectedError."""
    size = path.stat().st_size
    if size > MOST_TEXT_BYTES:
        msg = f"{path.name} must have at most {MOST_TEXT_BYTES:,} bytes. Got {size:,} at {str(path)!r}."
        raise RejectedError(msg)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        msg = f"{path.name} must be UTF-8 text. Got other bytes at {str(path)!r}: the file is damaged."
        raise RejectedError(msg) from error


def read_tensors(path: Path) -> Weights:
    """Tensors of a safetensors file, whose header is checked before anything is allocated; raises RejectedError."""
    found = read_weights(path)
    if found.kind != "safetensors":
        msg = f"{path.name} must be a safetensors file. Got a {found.kind} at {str(path)!r}."
        raise RejectedError(msg)
    return found


def proof_of(form: Mapping[str, Any], folder: Path) -> Proof:
    """The proof that was made when the folder was written."""
    try:
        written = dict(form["proof"])
        return Proof(**{**written, "shown": tuple(written["shown"])})
    except (TypeError, KeyError, ValueError) as error:
        msg = f"{FORM} in {folder} must hold the proof of the pruned model. Got none that can be read: prune it again, with this version."
        raise RejectedError(msg) from error


def fit_attributes(module: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse attributes that are not sizes the model has already: a file must not set methods, weights or hooks."""
    known = dict(module.named_modules(remove_duplicate=False))
    for path, values in attributes.items():
        for name in values:
            old = vars(known[path]).get(name) if path in known and not name.startswith("_") else None
            if isinstance(old, bool) or not (_is_size(old)):
                what = f"no module {path!r}" if path not in known else f"none called {name!r} at {path or 'the model'}"
                msg = f"{FORM} must set sizes that {type(module).__name__} has. Got {what}. Pass the class the model was pruned from."
                raise RejectedError(msg)


def described(inputs: Inputs) -> dict[str, Any]:
    """Example inputs as JSON keeps them: of tensors the shapes and dtypes, plain values as they are."""
    args, kwargs = inputs
    return {"args": [_described(v) for v in args], "kwargs": {k: _described(v) for k, v in kwargs.items()}}


def _described(value: Any) -> Any:
    """A list stands for a tuple; what else is no tensor has a mark, so that none is taken for another."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if type(value) is tuple:
        return [_described(v) for v in value]
    if type(value) is list:
        return {_LIST: [_described(v) for v in value]}
    if type(value) is dict and all(isinstance(k, str) for k in value):
        return {_DICT: [[k, _described(v)] for k, v in value.items()]}  # the file sorts keys, a graph knows their order
    if type(value) in _PLAIN:
        return {_VALUE: value}
    return {_OTHER: type(value).__name__}


def example_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The described inputs, their tensors as zeros; raises RejectedError where they cannot be made, or are larger than any example."""
    return {"args": _made(inputs["args"]), "kwargs": {k: _made(v) for k, v in inputs["kwargs"].items()}}


def _made(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_made(v) for v in value)
    if not isinstance(value, dict):
        return value
    if set(value) == {"shape", "dtype"}:
        return _zeros(value["shape"], value["dtype"])
    mark, inner = next(iter(value.items())) if len(value) == 1 else ("", None)
    if mark == _LIST and isinstance(inner, list):
        return [_made(v) for v in inner]
    if mark == _VALUE and type(inner) in _PLAIN:
        return inner
    if mark == _OTHER:
        msg = f"inputs in {FORM} must be tensors, numbers, texts, tuples, lists and dicts to be made again. Got a {str(inner)[:80]}. Pass inputs=…, those of the capture."
        raise RejectedError(msg)
    if mark == _DICT and isinstance(inner, list) and all(isinstance(p, list) and len(p) == 2 for p in inner):
        return {str(k): _made(v) for k, v in inner}
    return {k: _made(v) for k, v in value.items()}  # folders of before there were marks


def _zeros(shape: Any, dtype: Any) -> Tensor:
    right = isinstance(shape, list) and all(_is_int(n) and n >= 0 for n in shape) and str(dtype) in _DTYPES
    if not right or math.prod(shape) > MOST_INPUT_ELEMENTS:
        msg = f"inputs in {FORM} must be shapes of at most {MOST_INPUT_ELEMENTS:,} elements with a dtype of torch. Got {str(shape)[:80]} of {str(dtype)[:40]}."
        raise RejectedError(msg)
    return torch.zeros(shape, dtype=_DTYPES[dtype])


def tuples(attributes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """JSON has lists where torch's layers keep tuples."""
    return {p: {k: tuple(v) if isinstance(v, list) else v for k, v in a.items()} for p, a in attributes.items()}


def _rules(form: Mapping[str, Any]) -> dict[str, bool]:
    inputs, stages = form.get("inputs"), form.get("stages") or []
    notes, fits = form.get("notes", []), form.get("fits", {})
    right = isinstance(stages, list) and all(isinstance(s, dict) and isinstance(s.get("plan"), dict) for s in stages)
    return {
        "the realiser, module or graph": form.get("realiser") in ("module", "graph"),
        "the digest of the plan": isinstance(form.get("plan_digest"), str),
        "attributes that are sizes": _are_sizes(form.get("attributes")),
        "the inputs' shapes": isinstance(inputs, dict)
        and isinstance(inputs.get("args"), list)
        and isinstance(inputs.get("kwargs"), dict),
        "notes that are texts": isinstance(notes, list) and all(isinstance(n, str) for n in notes),
        "fits of a number before and after": isinstance(fits, dict) and all(_is_fit(f) for f in fits.values()),
        "stages with plan, realiser and attributes": right
        and all(s.get("realiser") in ("module", "graph") and _are_sizes(s.get("attributes")) for s in stages),
    }


def _is_fit(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"before", "after"}
        and all(isinstance(v, float) for v in value.values())
    )


def _are_sizes(attributes: object) -> bool:
    return isinstance(attributes, dict) and all(
        isinstance(values, dict) and all(_is_size(v) for v in values.values()) for values in attributes.values()
    )


def _is_size(value: object) -> bool:
    return _is_int(value) or (isinstance(value, list | tuple) and all(_is_int(v) for v in value))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
