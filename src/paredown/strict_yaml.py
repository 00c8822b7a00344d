"""YAML from strangers: plain data only, small, shallow, without duplicate keys or alias bombs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from paredown.errors import UsageError

MOST_BYTES = 2**20
MOST_ALIASES = 16
MOST_DEPTH = 32


def read_yaml(source: Path | str) -> Any:
    """One YAML document as plain data, from a file or a text. Raises UsageError with line and column.

    Refused: more than 1 MiB, more than 16 aliases, nesting deeper than 32, duplicate keys, keys that are not texts, tags
    such as !!python/object, merge keys, several documents. 2:4 and 1:30 are texts, as in YAML 1.2.

    >>> read_yaml("a: [1, 2.5, text]")
    {'a': [1, 2.5, 'text']}
    """
    where, text = ("the text", source) if isinstance(source, str) else (str(source), _text(source))
    if len(text) > MOST_BYTES:
        msg = f"YAML must be at most {MOST_BYTES:,} bytes. Got {len(text):,} at {where}."
        raise UsageError(msg)
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise UsageError(_explained(error, where)) from error
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
        # what PyYAML's constructors meet: an impossible date such as 2024-13-45, a tag over something else (!!int "")
        msg = f"YAML must hold plain data. Got {type(error).__name__}: {error} at {where}."
        raise UsageError(msg) from error
    finally:
        if loader is not None:
            loader.dispose()


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        msg = f"{path} must be a readable file. Got {error.strerror}."
        raise UsageError(msg) from error
    if len(data) > MOST_BYTES:
        msg = f"YAML must be at most {MOST_BYTES:,} bytes. Got {path.stat().st_size:,} at {path}."
        raise UsageError(msg)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"YAML must be UTF-8 text. Got byte {data[error.start]:#04x} at offset {error.start} of {path}."
        raise UsageError(msg) from error


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """SafeLoader with limits, and without numbers to base 60: 2:4 is a text, not 124."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._aliases = 0
        self._depth = 0

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        is_number = tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        return "tag:yaml.org,2002:str" if is_number and ":" in value else tag

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self._aliases += 1
            if self._aliases > MOST_ALIASES:
                msg = f"must hold at most {MOST_ALIASES} aliases"
                raise _refused(msg, self.peek_event().start_mark)
        self._depth += 1
        if self._depth > MOST_DEPTH:
            msg = f"must be nested at most {MOST_DEPTH} deep"
            raise _refused(msg, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, Any] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                msg = "must not use merge keys (<<)"
                raise _refused(msg, key.start_mark)
            if key.tag != "tag:yaml.org,2002:str":
                msg = f"must have texts as keys; {key.value!r} is read as something else, put it in quotes"
                raise _refused(msg, key.start_mark)
            if key.value in seen:
                msg = f"must give each key once; {key.value!r} is also at line {seen[key.value].line + 1}"
                raise _refused(msg, key.start_mark)
            seen[key.value] = key.start_mark
        made: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return made


def _refused(rule: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=rule, problem_mark=mark)


def _explained(error: yaml.YAMLError, where: str) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error)
    place = f" at {where}" + (f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else "")
    if problem.startswith("must "):
        return f"YAML {problem}. Got it{place}."
    if "another document" in problem:
        return f"YAML must be a single document. Got another one{place}."
    if "'\\t'" in problem:
        return f"YAML must be indented with spaces. Got a tab{place}. Replace tabs by spaces."
    if "could not determine a constructor" in problem:
        tag = problem.rpartition("tag ")[2]
        return f"YAML must hold plain data. Got the tag {tag}{place}. Nothing in a recipe is code."
    return f"YAML must be well formed. Got: {problem}{place}."
