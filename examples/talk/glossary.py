"""The glossary: every term with its formula, read from docs/glossary.md."""

from __future__ import annotations

import re
from pathlib import Path

from talk.page import Heading, Page, Part, Setting, Text

SOURCE = Path(__file__).parents[2] / "docs" / "glossary.md"


def build(setting: Setting) -> Page:
    """The sections of docs/glossary.md, so that there is one glossary and not two."""
    parts: list[Part] = []
    for block in re.split(r"\n\s*\n", SOURCE.read_text(encoding="utf-8"))[1:]:
        text = " ".join(block.split())
        parts.append(Heading(text=text.lstrip("# ")) if text.startswith("#") else Text(text=_plain(text)))
    return Page(
        title="Glossary",
        told=("A slide of terminologies, which was a picture.",),
        parts=tuple(parts),
        differ=("The slide was a picture, so these are the terms that this book and paredown use, each with its formula. Where the field uses a word in two ways, it says which one holds here.",),
    )  # fmt: skip


def _plain(text: str) -> str:
    """Links of markdown as their text: the book has none to outside."""
    return re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)
