"""The front page: what `paredown --help` and `--version` say, without the library that reads options.

They are what is typed first, and into scripts: reading options takes a tenth of a second of imports, and drawing its page another.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

PURPOSE = "From a trained PyTorch model to a small, proven, measured file on an edge runtime."
COMMANDS = {
    "paredown.cli.bundle:bundle": "Write a folder that runs a model on a phone or board over adb, ssh or there, with golden outputs to hold it to.",
    "paredown.cli.compare:compare": "Lay runs or model files side by side, time them in every runtime at hand, and say which is the fastest.",
    "paredown.cli.compress:compress": "Take a trained model to a proven, measured INT8 file with a report; the same command continues a killed run.",
    "paredown.cli.couple:couple": "Which channels must live or die together, which are pinned and why, and the ops without a rule.",
    "paredown.cli.coverage:coverage": "Capture, couple, cut and prove each model in a process of its own; resumable; exit 6 where a result is unproven.",
    "paredown.cli.curve:curve": "Amounts × methods × schedules × seeds with dense controls: the curve, its sweet spot, and whether pruning paid.",
    "paredown.cli.doctor:doctor": "Explain this environment: versions, processor, runtimes, what is broken and how to fix it.",
    "paredown.cli.examine:examine": "Parameters, MACs, bytes and activation memory, per layer and in total; MODEL may be an .onnx file too.",
    "paredown.cli.quantize:export": "Write a file in floating point, and check it in its runtime on the example input.",
    "paredown.cli.factorize:factorize": "Replace layers by low-rank chains, with a proof; train the result with your own loop.",
    "paredown.cli.init:init": "Write recipe.yaml and task.py: a small example that runs as it is, with marks where your own model goes.",
    "paredown.cli.measure:measure": "Bytes, latency (with its spread) and memory of a file, measured in its runtime on this machine.",
    "paredown.cli.numerics:numerics": "What quantization costs, as a page: casts, mapping, granularity, bits, and the noise in every layer of a model.",
    "paredown.cli.prune:prune": "Remove channels, heads or modules, or mask weights, with a proof; train the result with your own loop, or use compress.",
    "paredown.cli.quantize:quantize": "Quantize to 8 bits or fewer, with samples where the scheme needs them; export, and check the file in its runtime.",
    "paredown.cli.report:report": "Write report.html of a run from records.jsonl alone, and print the verdict.",
    "paredown.cli.sensitivity:sensitivity": "What every space at several amounts and every layer at several bits costs by itself; heat map, ranking, how stable.",
    "paredown.cli.setup:setup": "Make the environment of a target whose converter cannot share ours: pinned versions, in a folder of their own.",
}
"""Where a command is, and the first line of its docstring: a list of commands needs none of their modules."""


def answer(arguments: Sequence[str]) -> str | None:
    """The front page or the version, where nothing else is asked for.

    >>> answer(["--version"])
    '0.1.0'
    >>> answer(["examine", "--help"]) is None
    True
    """
    words = list(arguments)
    if words in ([], ["--help"], ["-h"]):
        return page(shutil.get_terminal_size().columns)
    if words != ["--version"]:
        return None
    import paredown

    return paredown.__version__


def page(columns: int) -> str:
    """How to call it, what it is for, and a line for every command, in lines of `columns` characters (60 to 120).

    >>> print(page(80)[:24])
    Usage: paredown COMMAND
    """
    width = min(max(columns, 60), 120)
    rows = {place.rpartition(":")[2]: summary for place, summary in COMMANDS.items()}
    rows |= {"--help, -h": "This page; after a command, that command's.", "--version": "The version."}
    indent = " " * (4 + max(map(len, rows)))
    listed = [
        textwrap.fill(f"  {name}".ljust(len(indent)) + summary, width, subsequent_indent=indent, break_on_hyphens=False)
        for name, summary in sorted(rows.items(), key=lambda row: (row[0].startswith("-"), row[0]))
    ]
    return "\n".join(["Usage: paredown COMMAND", "", textwrap.fill(PURPOSE, width), "", *listed])
