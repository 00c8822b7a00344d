"""The commands as an application that reads options (cyclopts)."""

from __future__ import annotations

from cyclopts import App

from paredown.cli.front import COMMANDS, PURPOSE


def _version() -> str:
    import paredown

    return paredown.__version__


app = App(
    name="paredown",
    help=PURPOSE,
    version=_version,
    help_format="plaintext",
    print_error=False,
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
for place, summary in COMMANDS.items():
    app.command(place, help=summary)
