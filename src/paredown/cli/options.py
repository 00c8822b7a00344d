"""Options that several commands share: one name, one meaning, one line of help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

Json = Annotated[
    bool,
    Parameter(name="--json", negative="", show_default=False, help="One JSON document on stdout; all else on stderr."),
]
Quiet = Annotated[
    bool, Parameter(name="--quiet", negative="", show_default=False, help="No progress, no tables; errors only.")
]
Strict = Annotated[
    bool,
    Parameter(name="--strict", negative="", show_default=False, help="An op that is not known is an error (exit 3)."),
]
DryRun = Annotated[
    bool,
    Parameter(
        name="--dry-run", negative="", show_default=False, help="Show the plan as a table; change and write nothing."
    ),
]
Overwrite = Annotated[
    bool,
    Parameter(name="--overwrite", negative="", show_default=False, help="Replace what an earlier run left at --out."),
]
Threads = Annotated[int | None, Parameter(name="--threads", help="Threads of PyTorch; default: all cores.")]
Device = Annotated[str | None, Parameter(name="--device", help="Where training runs: cpu, cuda, cuda:1, mps.")]
Set = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        help="Change a key of the recipe, as prune.criterion=l2; may be given again.",
        negative="",
        show_default=False,
    ),
]

Model = Annotated[
    str,
    Parameter(
        help="torchvision:resnet50, timm:resnet50, package.module:callable or path/to/file.py:callable. "
        "Naming your own code runs it."
    ),
]
_INPUT = Parameter(
    name="--input",
    help='Example input: 1x3x224x224, int64:1x16, or several by name: "ids=int64:1x16 mask=int64:1x16".',
)
Input = Annotated[str, _INPUT]
OptionalInput = Annotated[str | None, _INPUT]
Weights = Annotated[
    Path | None,
    Parameter(
        name="--weights",
        help="safetensors, or a .pt/.pth state_dict. Without it a library's model is random, your own as the callable makes it.",
    ),
]
OtherWeights = Annotated[
    Path | None, Parameter(name="--weights", help="Other weights than the recipe's: safetensors, or a state_dict.")
]
StripPrefix = Annotated[
    str | None,
    Parameter(
        name="--strip-prefix", help="Leave this beginning out of the names in --weights, as module. of DataParallel."
    ),
]
From = Annotated[
    Path | None,
    Parameter(
        name="--pruned", help="Folder that `paredown prune` or a run wrote: MODEL is cut and its weights are loaded."
    ),
]
Target = Annotated[str, Parameter(name="--target", help="The runtime that will execute the file.")]
