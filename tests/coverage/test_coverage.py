"""Coverage: rows of models made for the purpose, the journal, limits, the table and the exit code."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paredown.cli import main
from paredown.cli.coverage import _refuse
from paredown.coverage import Limits, counts, markdown, sweep
from paredown.coverage.one import main as one
from paredown.coverage.sweep import _VERSIONS, _Server, _versions
from paredown.errors import UsageError, VerificationError

NETS = '''
import os, time
import torch
from torch import nn


class Known(nn.Module):
    """Three channels of the input, 16 that are free, 4 that a cumulative sum pins, 2 outputs."""
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).cumsum(1)).mean((2, 3))


class Silent(Known):
    """An output that does not depend on any channel: equality would prove nothing."""
    def forward(self, x):
        return super().forward(x) * 0


class Unborn(Known):
    """A last layer of zeros, as published vision transformers have before they are trained."""
    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.c.weight)
        nn.init.zeros_(self.c.bias)


class Growing(Known):
    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else x


def fixed():
    return nn.Conv2d(3, 8, 1)


def dies():
    with open(__file__ + ".started", "a") as file:
        file.write("x")
    os._exit(7)


def fills():
    torch.empty(3_000_000_000)  # 12 GB that are not touched: without a limit there is no error
    return Known()


def orphans():
    os.kill(os.getppid(), 9)
    os._exit(7)


def sleeps():
    time.sleep(600)
'''


@pytest.fixture
def nets(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(NETS)
    return str(tmp_path / "nets.py")


def row(nets: str, name: str, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The last row of one model, made in this process, and those before it."""
    rows: list[dict[str, Any]] = []
    one(json.dumps({"model": f"{nets}:{name}", "channels": 0.5, **options}), lambda r: rows.append(dict(r)))
    return rows[-1], rows[:-1]


def test_a_row_says_what_was_found_and_proven(nets: str) -> None:
    last, before = row(nets, "Known")
    assert last["done"]
    assert last["status"] == "proven"
    assert last["parameters"] == (3 * 16 + 16) + (16 * 4 + 4) + (4 * 2 + 2)
    assert (last["spaces"], last["free_units"], last["pinned_units"]) == (1, 16, 4 + 2)
    assert last["free_share"] == round(16 / 22, 4)
    assert last["pinned_share"] == round(6 / 22, 4)
    assert last["reasons"]["model output"] == 2
    assert sum(last["reasons"].values()) == 6
    assert any("cumsum" in reason for reason in last["reasons"])
    assert last["removed"] == round((8 * 4 + 8 * 4) / last["parameters"], 4)
    assert last["realiser"] == "module"
    assert last["proof"]["max_error"] <= 1e-4 * last["proof"]["scale"]
    assert last["proof"]["moved"] > 1e-3 * last["proof"]["scale"]
    assert 0 < last["seconds"] < 60
    assert last["peak_memory_bytes"] > 1_000_000
    assert "parity" not in last  # it was not asked for
    assert [set(r) >= {"parameters"} for r in before] == [True, True]  # a killed process leaves what it knew


@pytest.mark.parametrize(
    ("name", "status", "told"),
    [
        ("Silent", "unproven", "must move"),
        ("Growing", "not captured", ""),
        ("fixed", "nothing to do", ""),
        ("none_such", "error", "none_such"),
    ],
)
def test_what_cannot_be_proven_says_why(nets: str, name: str, status: str, told: str) -> None:
    last, _ = row(nets, name)
    assert last["status"] == status
    assert last["message"]
    assert told in last["message"]
    assert "removed" not in last


def test_the_exported_file_is_compared(nets: str) -> None:
    last, before = row(nets, "Known", export=True)
    assert before[-1]["status"] == "proven"  # known before the export starts
    assert last["parity"]["max_error"] <= 1e-4 * last["parity"]["scale"]
    assert last["parity"]["scale"] > 0
    assert counts([last])["export parity"] == 1


def test_an_output_of_zeros_compares_nothing(nets: str) -> None:
    last, _ = row(nets, "Unborn", export=True)
    assert last["parity"]["scale"] > 1e-6
    assert counts([last])["export parity"] == 1
    assert counts([{**last, "parity": {"max_error": 0.0, "scale": 0.0}}])["export parity"] == 0


def test_whatever_ends_a_process_is_marked_and_the_journal_goes_on(nets: str, tmp_path: Path) -> None:
    """By itself, by memory, with its server, by time. Servers take seconds to start, so all of it is one story."""
    journal, started = tmp_path / "runs" / "journal.jsonl", Path(nets + ".started")
    some = [f"{nets}:{name}" for name in ("dies", "fills", "orphans", "Known")]
    ended = sweep(some, journal=journal, limits=Limits(memory_bytes=8 * 10**9))
    assert [r["status"] for r in ended] == ["killed", "not captured", "killed", "proven"]
    assert "exit 7" in ended[0]["message"]
    assert "memory" in ended[1]["message"].lower()
    assert len(started.read_text()) == 1
    # a machine that stops in the middle of a line
    journal.write_text(journal.read_text() + '{"model": "torn", "sta')
    # other options make other rows
    models = [f"{nets}:dies", f"{nets}:sleeps"]
    seen: list[int] = []
    rows = sweep(
        models, journal=journal, limits=Limits(seconds=4.0), channels=0.3, progress=lambda row, n: seen.append(n)
    )
    assert seen == [0, 1]
    assert rows[0]["status"] == "killed"
    assert (rows[1]["status"], rows[1]["seconds"]) == ("timeout", 4.0)
    assert len(started.read_text()) == 2
    whole = [json.loads(line) for line in journal.read_text().splitlines() if not line.endswith('"sta')]
    assert [r["model"] for r in whole] == [*some, *models]
    assert sweep(some, journal=journal) == ended
    assert sweep(models, journal=journal, channels=0.3) == rows
    assert len(started.read_text()) == 2  # not run again


def test_a_server_that_has_closed_its_end_is_not_asked_again() -> None:
    server = _Server(1)
    silent = "import os, time; os.close(1); time.sleep(60)"  # as one that was killed and is not gone yet
    server.process = subprocess.Popen([sys.executable, "-c", silent], stdin=-1, stdout=-1, text=True)
    began = server.process
    assert list(server.rows({"asked": {}})) == []
    assert server.process is None
    assert began.poll() is not None


@pytest.mark.parametrize("channels", [0.0, 1.0, 2, -0.5])
def test_what_remains_must_be_a_fraction(channels: float) -> None:
    with pytest.raises(UsageError, match="fraction"):
        sweep([], channels=channels)


def journalled(journal: Path, **changed: Any) -> None:
    """A journal as an earlier run of the same options left it."""
    options = {"channels": 0.5, "export": False, "versions": _versions(_VERSIONS)}
    journal.write_text("".join(json.dumps({**r, **changed, "options": options}) + "\n" for r in ROWS))


def test_only_what_was_exported_is_run_again_after_another_version_of_an_exporter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run(server: _Server, model: str, *rest: Any) -> dict[str, Any]:
        ran.append(model)
        return {"model": model, "status": "proven", **({"parity": {}} if model == "exported" else {})}

    def asked(**options: Any) -> list[str]:
        ran.clear()
        sweep(("exported", "stopped before"), journal=tmp_path / "journal.jsonl", **options)
        return [*ran]

    monkeypatch.setattr(sys.modules["paredown.coverage.sweep"], "_run", run)  # the package has a function of that name
    assert asked() == asked(export=True) == ["exported", "stopped before"]
    assert asked() == asked(export=True) == []
    version = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99" if name == "onnxruntime" else version(name))
    assert asked() == []
    assert asked(export=True) == ["exported"]
    assert asked(export=True) == []
    assert asked(retry=("killed",)) == []
    assert asked(retry=("killed", "proven")) == ["exported", "stopped before"]  # a status can be asked for again


def test_one_unproven_result_is_exit_6_after_the_table_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal, out = tmp_path / "journal.jsonl", tmp_path / "coverage.md"
    names = [r["model"] for r in ROWS]
    asked = ["coverage", *names, "--journal", str(journal), "--out", str(out), "--json"]
    journalled(journal)
    assert main(asked) == 6
    printed = capsys.readouterr()
    assert "zoo:wrong" in printed.err
    assert json.loads(printed.out)["counts"]["unproven"] == 1
    assert "| wrong |" in out.read_text()
    journalled(journal, status="proven")
    assert main(asked) == 0


def test_a_file_that_answers_otherwise_is_exit_6() -> None:
    from paredown.coverage.table import disagreeing

    rows = [
        {"model": "right", "parity": {"max_error": 1e-6, "scale": 1.0}}, {"model": "wrong", "parity": {"max_error": 0.5, "scale": 1.0}},
        {"model": "refused", "parity": {"message": "no rule"}}, {"model": "untried"},
    ]  # fmt: skip
    assert disagreeing(rows) == ["wrong"]
    with pytest.raises(VerificationError, match=r"answer as its pruned model.*wrong"):
        _refuse([{**r, "status": "proven"} for r in rows])


def test_a_model_that_does_not_exist_is_exit_2_after_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\n\n\ndef net():\n    return nn.Linear(3, 3)\n")
    asked = ["coverage", "--journal", str(tmp_path / "journal.jsonl"), "--json"]
    assert main([*asked, "nonexist", f"{tmp_path}/net.py:net", f"{tmp_path}/net.py:nett"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["counts"]["error"] >= 2
    assert "MODEL must be torchvision:NAME" in printed.err
    assert "1 more like it" in printed.err
    assert main([*asked, "nonexist"]) == 2, "from the journal, too"


ROWS: list[dict[str, Any]] = [
    {
        "model": "zoo:right",
        "channels": 0.5,
        "status": "proven",
        "input": [[2, 3, 64, 48]],
        "parameters": 12345,
        "spaces": 3,
        "free_share": 0.75,
        "pinned_share": 0.25,
        "reasons": {"model output": 10, "softmax|over channels": 1200, "cumsum": 7, "one more": 2},
        "removed": 0.5,
        "realiser": "module",
        "proof": {"max_error": 2e-6, "scale": 4.0, "moved": 3.0, "mode": "float32"},
        "parity": {"max_error": 3e-7, "scale": 0.1},
        "seconds": 4.4,
    },
    {
        "model": "zoo:wrong",
        "channels": 0.5,
        "status": "unproven",
        "parameters": 1,
        "reasons": {"model output": 1},
        "proof": {"max_error": 1.0, "scale": 2.0, "moved": 1.0, "mode": "float64"},
        "seconds": 1.0,
        "message": "pruned must equal | dense",
    },
    {"model": "other:late", "channels": 0.5, "status": "timeout", "seconds": 120.0, "message": "not done in 120 s"},
]


def test_the_table_has_every_column_that_was_measured() -> None:
    text = markdown(ROWS)
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("| model |"))
    cells = dict(zip(_cells(head), _cells(next(line for line in lines if "| right |" in line)), strict=True))
    assert cells == {
        "model": "right",
        "input": "3×64×48",
        "parameters": "12,345",
        "spaces": "3",
        "free": "75 %",
        "pinned": "25 %",
        "why pinned": "softmax\\|over channels (1,200); cumsum (7)",
        "removed": "50.0 %",
        "proof error": "5e-07 (float32)",
        "realiser": "module",
        "ONNX parity": "3e-06",
        "s": "4",
        "status": "proven",
    }
    late = _cells(next(line for line in lines if "| late |" in line))
    assert late.count("not tested") == 9
    assert len(late) == len(cells)
    assert "| softmax\\|over channels | 1 | 1,200 |" in lines
    assert "| export parity | 1 | 33.3 % |" in lines
    assert counts(ROWS)["captured"] == 2


def _cells(line: str) -> list[str]:
    return [c.strip() for c in line.strip("|").replace("\\|", "\0").replace("|", "\1").replace("\0", "\\|").split("\1")]
