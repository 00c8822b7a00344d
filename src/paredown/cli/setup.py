"""paredown setup: the environment of a converter that cannot share ours.

The folder is ~/.cache/paredown/environments, or PAREDOWN_ENVIRONMENTS. pip's own settings hold: on Linux,
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves the gigabytes of a torch for CUDA.
"""

from __future__ import annotations

import json as json_module
from typing import Annotated

from cyclopts import Parameter

from paredown.cli import options
from paredown.cli.show import emit, say, show


def setup(
    target: Annotated[str, Parameter(help="executorch-xnnpack or litert.")],
    /,
    *,
    overwrite: Annotated[
        bool,
        Parameter(name="--overwrite", negative="", show_default=False, help="Make it anew, also where it is there."),
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Make the environment of a target whose converter cannot share ours: pinned versions, in a folder of their own."""
    from paredown.environments import READY, make

    folder = make(target, overwrite=overwrite, say=lambda line: say(line, quiet=quiet or json))
    versions = json_module.loads((folder / READY).read_text(encoding="utf-8"))["versions"]
    if json:
        emit({"schema": 1, "target": target, "folder": str(folder), "versions": versions})
    else:
        show(f"{target} is ready: {', '.join(f'{n} {v}' for n, v in versions.items())}", str(folder), quiet=quiet)
    return 0
