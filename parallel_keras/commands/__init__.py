"""The commands of `python -m parallel_keras`, one module each.

A command's module defines its flags with absl and a function `main() -> None`. The library never
imports this package: flags are global to a process, and those of a command are no user's business.
"""

from __future__ import annotations

from typing import Final

COMMANDS: Final[dict[str, str]] = {
    "demo": "Train on handwritten digits on one device and on all of them, and compare the two.",
    "bench": "Train your own model on one device and on several, and compare the times.",
}
"""Each command with the line that stands for it in the list of commands."""


class CommandError(Exception):
    """A failure that the user can mend; its text is one line that also says how."""
