"""Tables that a phone shows as stacked rows: every cell then carries the head of its column, which is hidden."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from sample_run import sample

from curve_records import head, sweep, trial
from paredown.report import render
from paredown.report.curves import render_curve


class Stacked(HTMLParser):
    """(heads, labels, cells of each row) of every stacked table."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.inside = self.heading = False
        self.tables: list[tuple[list[str], list[str], list[int]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "table":
            self.inside = "stack" in (given.get("class") or "").split()
            if self.inside:
                said = re.findall(r"--l(\d+):'([^']*)'", given.get("style") or "")
                assert [int(at) for at, _ in said] == [*range(1, len(said) + 1)]
                plain = [re.sub(r"\\([0-9a-f]+) ", lambda m: chr(int(m[1], 16)), label) for _, label in said]
                self.tables.append(([], plain, []))
        elif self.inside and tag == "th" and given.get("scope") == "col":
            self.heading = True
            self.tables[-1][0].append("")
        elif self.inside and tag == "tr" and self.tables[-1][0]:
            self.tables[-1][2].append(0)
        elif self.inside and tag in ("td", "th") and self.tables[-1][2]:
            assert "colspan" not in given  # the cells behind it would take the heads of others
            self.tables[-1][2][-1] += 1

    def handle_endtag(self, tag: str) -> None:
        self.heading = self.heading and tag != "th"
        self.inside = self.inside and tag != "table"

    def handle_data(self, data: str) -> None:
        if self.heading:
            self.tables[-1][0][-1] += data


HOSTILE = """a'b";x:url(//c) \\ } <i>"""


def curve(name: str = "accuracy") -> str:
    dense, line = [98.5, 98.3, 98.6], {0.5: [98.0, 97.8, 97.9]}
    scratch = [trial("scratch", 0.5, s, 96.0, 95.0, steps=1000) for s in range(3)]
    return render_curve([head(metric={"name": name, "unit": "%", "goal": "max"}), *sweep(line, dense), *scratch])


def run() -> str:
    return render(sample())


def numerics() -> str:
    pytest.importorskip("matplotlib")
    from paredown.quantize.facts import numerics_facts
    from paredown.report.numerics import numerics_page

    return numerics_page(numerics_facts())


@pytest.mark.parametrize(("made", "tables"), [(curve, 3), (run, 8), (numerics, 3), (lambda: curve(HOSTILE), 3)])
def test_every_cell_of_a_stacked_table_has_the_head_of_its_column(made: Callable[[], str], tables: int) -> None:
    page = made()
    found = Stacked(page).tables
    assert len(found) == tables
    for heads, labels, cells in found:
        assert labels == [h.strip() for h in heads] and cells and set(cells) == {len(heads)}
        assert f"nth-child({len(heads)})::before{{content:var(--l{len(heads)})}}" in page
