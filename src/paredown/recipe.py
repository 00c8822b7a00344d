"""Recipe: one run as strict data. YAML in, typed and checked; nothing in it is code, and nothing is guessed.

Every option is one field with its docstring; the JSON Schema (`recipe_schema`), the errors and the defaults all come
from these fields.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]
from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
)

from paredown.errors import RejectedError, UsageError
from paredown.recipe_fields import Base, Bounds, CurveGrid, DenseTwin, Level, Measure, Prune, Quantize, Recover, Strict
from paredown.strict_yaml import read_yaml
from paredown.target import named

SCHEMA = 1
EMBEDDED = Path(__file__).with_name("recipes")
_FILE_FIELDS = ("task", "model", "weights", "data")


class Recipe(Strict):
    """One run, from the model to the report. Read with `load_recipe`."""

    schema_: int = Field(alias="schema")
    """Version of this format: 1."""
    name: str = Field(default="run", min_length=1, max_length=200)
    """Shown in the report."""
    task: str = Field(min_length=1, max_length=4096)
    """Model, data and measure: "digits" or "cifar10", a path to a file.py (relative to the recipe), or package.module."""
    task_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Filled in for a task in a file: a run is not continued with another task. Where given, it must fit the file."""
    given: dict[str, str] = Field(default_factory=dict)
    """Filled in by `compress(model, …)` in Python: digests of the functions it was given, and the metric; a run is not
    continued with others."""
    model: str | None = Field(default=None, max_length=4096)
    """Replaces the task's model: torchvision:NAME, timm:NAME, package.module:callable or path/to/file.py:callable."""
    weights: str | None = Field(default=None, max_length=4096)
    """safetensors file, or a .pt/.pth state_dict (relative to the recipe)."""
    data: str | None = Field(default=None, max_length=4096)
    """Folder handed to the task's functions that have a parameter `data` (relative to the recipe)."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """The same recipe, seed and versions give the same plan, model and export on a CPU."""
    device: str = Field(default="cpu", pattern=r"^(cpu|mps|cuda(:\d{1,3})?)$")
    """Where training runs: cpu, cuda, cuda:1, mps."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of PyTorch; null leaves them as they are."""
    target: str = "onnxruntime-x86"
    """The runtime that will execute the file."""
    base: Base = Base()
    prune: Prune = Prune()
    recover: Recover = Recover()
    quantize: Quantize = Quantize()
    dense_twin: DenseTwin = DenseTwin()
    measure: Measure = Measure()
    budget: Bounds = Bounds()
    curve: CurveGrid | None = None
    """Amounts × methods × schedules × seeds of `paredown curve`; the other commands leave it aside."""

    _folder: Path | None = PrivateAttr(default=None)

    @field_validator("target")
    @classmethod
    def _known(cls, target: str) -> str:
        return named(target).name

    @property
    def folder(self) -> Path | None:
        """Where the recipe lies; None for one that was made in Python."""
        return self._folder

    @property
    def data_path(self) -> Path | None:
        """`data` as a path."""
        return None if self.data is None else Path(self.data)

    @property
    def weights_path(self) -> Path | None:
        """`weights` as a path."""
        return None if self.weights is None else Path(self.weights)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the resolved recipe, 64 hexadecimal digits."""
        text = json.dumps(self._plain(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def of_level(self, level: Level) -> Recover:
        """The recovery of one level: its own epochs, where it has some."""
        return self.recover if level.epochs is None else self.recover.model_copy(update={"epochs": level.epochs})

    @property
    def recovery_epochs(self) -> int:
        """Of all levels together."""
        return sum(self.of_level(level).epochs for level in self.prune.levels)

    def to_yaml(self) -> str:
        """The resolved recipe: every field, with the defaults that were used; paths absolute."""
        return str(yaml.safe_dump(self._plain(), sort_keys=False, allow_unicode=True, width=1000))

    def _plain(self) -> dict[str, Any]:
        plain = self.model_dump(mode="json", by_alias=True)
        if self.curve is None:  # most recipes have none: theirs stay as they are
            del plain["curve"]
        else:
            for name, usual in (("spacing", "geometric"), ("quantized", False)):
                if plain["curve"][name] == usual:
                    del plain["curve"][name]
        if not self.given:
            del plain["given"]
        if self.recover.ranks == 1:
            del plain["recover"]["ranks"]
        self._shorten_prune(plain["prune"])
        if not self.recover.distil_layers:
            del plain["recover"]["distil_layers"], plain["recover"]["distil_layers_weight"]
        if not self.measure.noise:
            del plain["measure"]["noise"]
        for name in ("together", "front"):
            if not plain["budget"][name]:
                del plain["budget"][name]
        if not self.budget.trial.limits:
            del plain["budget"]["trial"]
        return plain

    def _shorten_prune(self, plain: dict[str, Any]) -> None:
        """Leave out what later versions added, where it has its default."""
        if self.prune.allocation is None and _all_uniform(self):  # the default once: runs that are begun go on
            plain["allocation"] = "uniform"
        elif self.prune.allocation is None:
            del plain["allocation"]
        if self.prune.sensitivity is None:
            del plain["sensitivity"]
        if not self.prune.regularize_options:
            del plain["regularize_options"]
        for level in plain["levels"]:
            for name in ("epochs", "energy", "masks", "masks_sha256"):
                if level[name] is None:
                    del level[name]


def level_of(recipe: Recipe) -> Level | None:
    """The level that a budget of channels or of a density is; None for amounts that are searched."""
    bounds, prune = recipe.budget, recipe.prune
    if prune.levels or not bounds.rounds or (bounds.channels is None and bounds.density is None):
        return None
    plain = prune.granularity == "channel" and bounds.density is not None
    return Level(channels=bounds.channels, density=bounds.density, granularity="element" if plain else None)


def _all_uniform(recipe: Recipe) -> bool:
    """Whether the usual allocation of all that a recipe prunes is uniform: its levels, and the ways of its curve."""
    alone = level_of(recipe)
    usual = {recipe.prune.usual_allocation(level) for level in (*recipe.prune.levels, *([alone] if alone else []))}
    for method in recipe.curve.methods if recipe.curve is not None else ():
        given = method.model_dump(exclude_none=True, include={"criterion", "granularity"})
        for schedule in recipe.curve.schedules if recipe.curve is not None else ():
            of_masks = "one-shot" if schedule in ("multi-level", "from-scratch") else schedule
            way = recipe.prune.model_copy(update={**given, "schedule": of_masks})
            usual.add(way.usual_allocation(Level(factorize=method.factorize)))
    return usual <= {"uniform"}


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: an embedded name ("digits", "cifar10"), a path, or a mapping; then apply "key=value" overrides.

    Keys of overrides go down by dots ("prune.levels.0.macs=0.5"); values are read as YAML, for texts and paths as they
    are (null or nothing clears a path). Relative paths are relative to the recipe, those of overrides to the current
    folder; the result holds absolute ones. Raises UsageError, with all mistakes at once and what was probably meant.

    >>> load_recipe("digits", ["prune.criterion=l2"]).prune.criterion
    'l2'
    """
    if isinstance(source, Mapping):
        data, folder, where = _copied(source), None, "the recipe"
    else:
        path = find_recipe(source)
        where = f"the recipe {path.stem}" if path.parent == EMBEDDED else str(path)
        data, folder = read_yaml(path), path.resolve().parent
        if not isinstance(data, dict):
            kind = "nothing" if data is None else f"a {type(data).__name__}"
            msg = f"a recipe must be a mapping of keys to values. Got {kind} at {where}."
            raise UsageError(msg)
    _absolute(data, folder)
    changed: dict[str, Any] = {}
    for text in overrides:
        _override(data, text, changed)
    _absolute_masks(data, Path.cwd())  # whole levels that an override gave
    return parse_recipe(data, where=where, folder=folder)


def parse_recipe(data: Mapping[str, Any], *, where: str = "the recipe", folder: Path | None = None) -> Recipe:
    """A recipe from plain data. Raises UsageError with every mistake.

    >>> parse_recipe({"schema": 1, "task": "digits", "prune": {"levels": [{"macs": 0.5}]}}).prune.levels[0].macs
    0.5
    """
    _check_schema(data, where)
    try:
        text = json.dumps(data, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"a recipe must hold texts, finite numbers, true, false, null, lists and mappings. {error} at {where}. Put dates and odd keys in quotes."
        raise UsageError(msg) from error
    try:
        recipe = Recipe.model_validate_json(text)
    except ValidationError as error:
        raise UsageError(_explained(error, where)) from error
    recipe._folder = folder
    return _with_digests(recipe, where)


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors and for the docs."""
    return Recipe.model_json_schema()


def diff(before: Recipe | str, after: Recipe | str) -> str:
    """How two recipes differ, one line per key; "" where they do not. Texts are YAML.

    >>> print(diff("seed: 0", "seed: 1"))
      seed: 0 → 1
    """
    a, b = (dict(_leaves(r._plain() if isinstance(r, Recipe) else _read_text(r))) for r in (before, after))
    keys = [*a, *(k for k in b if k not in a)]
    missing = "(not there)"
    return "\n".join(
        f"  {k}: {a.get(k, missing)} → {b.get(k, missing)}" for k in keys if a.get(k, missing) != b.get(k, missing)
    )


def embedded_names() -> tuple[str, ...]:
    """Recipes that ship with paredown."""
    return tuple(sorted(p.stem for p in EMBEDDED.glob("*.yaml")))


def find_recipe(source: str | Path) -> Path:
    """The path of a recipe by embedded name or path; raises UsageError with what is near."""
    if isinstance(source, str) and source in embedded_names():
        return EMBEDDED / f"{source}.yaml"
    path = Path(source)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError) as error:  # names that are too long, or hold a NUL
        msg = f"a recipe must be a path or one of {', '.join(embedded_names())}. Got {str(source)[:80]!r}…: {error}."
        raise UsageError(msg) from error
    if is_file:
        return path
    if is_folder:
        near = sorted(p.name for p in path.iterdir() if p.suffix in (".yaml", ".yml"))
        hint = f"It holds {', '.join(near[:8])}." if near else "It holds no .yaml file."
        msg = f"a recipe must be a file. Got the folder {path}. {hint}"
        raise UsageError(msg)
    folder = path.parent
    names = [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, [*embedded_names(), *names], n=3, cutoff=0.4)
    hint = f" Near it: {', '.join(near)}." if near else ""
    msg = f"a recipe must exist: a path, or one of {', '.join(embedded_names())}. Got {str(source)!r}.{hint}"
    raise UsageError(msg)


# --------------------------------------------------------------------------------------------------- paths, overrides


def _absolute(data: dict[str, Any], folder: Path | None) -> None:
    """Make the paths in a recipe absolute: relative ones are relative to the recipe."""
    for key in _FILE_FIELDS:
        value = data.get(key)
        if isinstance(value, str) and value:
            data[key] = _absolute_text(key, value, folder or Path.cwd())
    prune = data.get("prune")
    if isinstance(prune, dict) and isinstance(prune.get("sensitivity"), str):
        prune["sensitivity"] = _absolute_path(prune["sensitivity"], folder or Path.cwd())
    _absolute_masks(data, folder or Path.cwd())


def _absolute_masks(data: dict[str, Any], folder: Path) -> None:
    """The same for masks of levels; what is of the wrong kind is left to the errors of the fields."""
    prune = data.get("prune")
    levels = prune.get("levels") if isinstance(prune, dict) else None
    for level in levels if isinstance(levels, list) else ():
        if isinstance(level, dict) and isinstance(level.get("masks"), str) and level["masks"]:
            level["masks"] = _absolute_path(level["masks"], folder)


def _absolute_text(key: str, value: str, folder: Path) -> str:
    """A path as an absolute one; names of modules and zoos stay."""
    path, colon, function = value.rpartition(":")
    if key == "model":
        return f"{_absolute_path(path, folder)}{colon}{function}" if path.endswith(".py") else value
    if key == "task" and not value.endswith(".py"):
        return value
    return _absolute_path(value, folder)


def _absolute_path(value: str, folder: Path) -> str:
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:  # ~name of nobody
        msg = f"a path with ~ must begin with a home folder. Got {value!r}: {error} Write the whole path."
        raise UsageError(msg) from error
    return str(path if path.is_absolute() else Path(_normal(folder / path)))


def _normal(path: Path) -> str:
    import os

    return os.path.normpath(path)  # not resolve(): a symbolic link is what the user named


def _with_digests(recipe: Recipe, where: str) -> Recipe:
    """Fill in the digests of a task file and of files of masks; those that were given must fit."""
    filled: dict[str, Any] = {}
    if recipe.task.endswith(".py"):
        kind = f"a readable file, an embedded name or a module. Got {recipe.task!r}"
        filled["task_sha256"] = _digest_of_file(recipe.task, recipe.task_sha256, ("task", kind), where)
    levels = list(recipe.prune.levels)
    for at, level in enumerate(levels):
        if level.masks is not None:
            what = ("masks", f"a readable file. Got {level.masks!r}")
            found = _digest_of_file(level.masks, level.masks_sha256, what, f"{where}, level {at + 1}")
            levels[at] = level.model_copy(update={"masks_sha256": found})
            filled["prune"] = recipe.prune.model_copy(update={"levels": tuple(levels)})
    if not filled:
        return recipe
    whole = recipe.model_copy(update=filled)
    whole._folder = recipe._folder
    return whole


def _digest_of_file(path: str, given: str | None, what: tuple[str, str], where: str) -> str:
    name, rule = what
    try:
        with Path(path).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        msg = f"{name} must be {rule}: {getattr(error, 'strerror', None) or error}, at {where}."
        raise RejectedError(msg) from error
    if given not in (None, found):
        msg = f"{name}_sha256 must fit the {name} file {path}. Got {given}, the file has {found}: it was changed since. Delete the line to accept it."
        raise UsageError(msg)
    return found


def _override(data: dict[str, Any], text: str, changed: dict[str, Any]) -> None:
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        msg = f"--set must be key=value, as prune.criterion=l2. Got {text!r}."
        raise UsageError(msg)
    if key in changed:
        msg = f"--set must give each key once. Got {key!r} twice: {changed[key]!r} and {value!r}."
        raise UsageError(msg)
    changed[key] = value
    parsed: Any = value if _takes_text(path) else _read_value(value, key)
    if _is_path(path):
        parsed = None if value.strip() in ("", "null") else _absolute_text(path[-1], value, Path.cwd())
    owner: Any = data
    for depth, part in enumerate(path[:-1]):
        owner = _descend(owner, part, ".".join(path[: depth + 1]))
    last = path[-1]
    if isinstance(owner, list):
        owner[_index(owner, last, key)] = parsed
    elif isinstance(owner, dict):
        owner[last] = parsed
    else:
        msg = f"--set must name a key below a mapping or a list. Got {key!r}, but {'.'.join(path[:-1])} is {owner!r}."
        raise UsageError(msg)


def _descend(owner: Any, part: str, key: str) -> Any:
    if isinstance(owner, list):
        return owner[_index(owner, part, key)]
    if not isinstance(owner, dict):
        msg = f"--set must name a key below a mapping or a list. Got {key!r}."
        raise UsageError(msg)
    if owner.get(part) is None:
        owner[part] = {}
    return owner[part]


def _index(owner: list[Any], part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(owner):
        msg = f"--set must index a list of {len(owner)} with 0…{len(owner) - 1}. Got {part!r} in {key!r}. Give the whole list: key=[…]."
        raise UsageError(msg)
    return int(part)


def _takes_text(path: list[str]) -> bool:
    """Whether a key holds a text that must not be read as YAML (a path may hold ':' or '#')."""
    return _is_path(path) or (len(path) == 1 and path[0] in ("name", "device", "target"))


def _is_path(path: list[str]) -> bool:
    of_a_level = len(path) == 4 and path[:2] == ["prune", "levels"] and path[3] == "masks"
    return of_a_level or path == ["prune", "sensitivity"] or (len(path) == 1 and path[0] in _FILE_FIELDS)


def _read_value(value: str, key: str) -> Any:
    try:
        return _read_text(value) if value.strip() else ""
    except UsageError as error:
        msg = f"--set {key} must be a YAML value. {error}"
        raise UsageError(msg) from error


def _read_text(text: str) -> Any:
    return read_yaml(text)


def _copied(source: Any) -> Any:
    """A deep copy as dicts and lists: overrides must not reach the caller's data."""
    if isinstance(source, Mapping):
        return {k: _copied(v) for k, v in source.items()}
    return [_copied(v) for v in source] if isinstance(source, list | tuple) else source


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, json.dumps(value, ensure_ascii=False, default=str)


# ------------------------------------------------------------------------------------------------------------- errors


def _check_schema(data: Mapping[str, Any], where: str) -> None:
    got = data.get("schema")
    if got is None:
        msg = f"a recipe must say its version. Got no schema at {where}. Add the line `schema: {SCHEMA}`."
        raise UsageError(msg)
    if isinstance(got, int) and not isinstance(got, bool) and got > SCHEMA:
        msg = f"schema must be at most {SCHEMA} for this version of paredown. Got {got} at {where}. The recipe is newer: pip install --upgrade paredown."
        raise UsageError(msg)
    if got != SCHEMA or isinstance(got, bool):
        msg = f"schema must be {SCHEMA}. Got {got!r} at {where}."
        raise UsageError(msg)


_RULES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
}


def _explained(error: ValidationError, where: str) -> str:
    """All mistakes of a recipe, one line each."""
    found: dict[str, str] = {}
    for mistake in error.errors(include_url=False):
        # A value of a union is reported once per member: the first report is enough.
        path = _path(p for p in mistake["loc"] if p not in ("float", "int"))
        found.setdefault(path, _mistake(path, cast(Mapping[str, Any], mistake), where))
    lines = list(found.values())
    more = [f"… and {len(lines) - 10} more."] if len(lines) > 10 else []
    return "\n".join([*lines[:10], *more])


def _mistake(path: str, mistake: Mapping[str, Any], where: str) -> str:
    kind, got, context = mistake["type"], mistake.get("input"), mistake.get("ctx", {})
    shown = repr(got)[:80]
    if kind == "extra_forbidden":
        return f"{path} is not a key of a recipe, at {where}.{_suggestion(path)}"
    if kind == "missing":
        return f"{path} must be given, at {where}."
    if kind == "value_error":
        message, leaf = str(context.get("error", mistake["msg"])), path.rpartition(".")[2]
        if f"budget.{leaf}" in message:
            message = message.replace(f"budget.{leaf}", path, 1)
        elif not message.startswith(leaf):
            message = f"{path}: {message}"
        return f"{message} At {where}."
    rule = _RULES.get(kind) or str(mistake["msg"]).removeprefix("Input should be ").removeprefix("String should ")
    if kind == "literal_error":
        rule = f"one of {context['expected']}"
    elif kind == "string_pattern_mismatch":
        rule = f"of the form {context['pattern']}"
    return f"{path} must be {rule}. Got {shown} at {where}.{_hint(kind, got, context)}"


_NOT_A_LEVEL = " A level gives channels, parameters, macs, density or modules; budget.{} bounds the finished file, after it was measured, and one more level is searched that meets it."
_BY_LATENCY = (
    " Channels by a table of latencies are chosen in Python: paredown.allocate(…, Budget(latency_ms=…), latency=table)."
)


def _hint(kind: str, got: Any, context: Mapping[str, Any]) -> str:
    if kind == "literal_error":
        if isinstance(got, bool) or got is None:
            return " YAML reads yes, no, on, off and null as values: put a text in quotes."
        choices = re.findall(r"'([^']+)'", str(context["expected"]))
        near = difflib.get_close_matches(str(got), choices, n=1, cutoff=0.4)
        return f" Did you mean {near[0]!r}?" if near else ""
    if isinstance(got, str) and re.fullmatch(r"[+-]?\d+(\.\d+)?%?|[+-]?\d[\d_.]*e[+-]?\d+", got.strip(), re.IGNORECASE):
        if got.strip().endswith("%"):
            return " Write 25 % as 0.25."
        return (
            " It is a text: YAML reads 1e-3 as text, write 0.001 or 1.0e-3."
            if "e" in got.lower()
            else " Leave out the quotes."
        )
    return ""


def _suggestion(path: str) -> str:
    """What an unknown key was probably meant to be: a sibling, or the same key elsewhere."""
    bound = re.fullmatch(r"prune\.levels\[\d+\]\.(latency|latency_ms|size_bytes|peak_ram_bytes|metric_loss)", path)
    if bound:
        return _NOT_A_LEVEL.format(bound[1]) + (_BY_LATENCY if bound[1].startswith("latency") else "")
    known = dict(_fields(Recipe))
    parent, _, leaf = re.sub(r"\[\d+\]", "", path).rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    near = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {siblings[near[0]]}?"
    elsewhere = {k.rpartition(".")[2]: k for k in known}
    near = difflib.get_close_matches(leaf, elsewhere, n=1, cutoff=0.75)
    if near:
        return f" Did you mean {elsewhere[near[0]]}?"
    return f" Keys here: {', '.join(siblings)}." if siblings else ""


def _fields(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, str]]:
    """(path, description) of every field, lists of models included."""
    for name, field in model.model_fields.items():
        here = f"{path}.{field.alias or name}" if path else field.alias or name
        yield here, field.description or ""
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _fields(kind, here)


def _path(parts: Iterable[int | str]) -> str:
    out = ""
    for part in parts:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else str(part)
    return out or "the recipe"
