"""paredown doctor: what is installed here, what this machine can do, what is wrong and how to mend it."""

from __future__ import annotations

from paredown.cli import options
from paredown.cli.show import emit, show


def doctor(*, json: options.Json = False) -> int:
    """Explain this environment: versions, processor, runtimes, what is broken and how to fix it."""
    from json import loads

    from paredown.doctor import diagnose

    diagnosis = diagnose()
    if json:
        emit(loads(diagnosis.to_json()))
    else:
        show(diagnosis)
    return diagnosis.exit_code
