"""The commands of `python -m parallel_keras`, one module each.

A command's module defines its flags with absl, and a function `main` that returns nothing or an
exit code. The parameters of `main` are what the command takes besides flags, each a string:
`main()` takes nothing, `main(model)` one argument, `main(count, script, *arguments)` two and what
follows them. Flags may stand anywhere, but with `*arguments` only before the first argument:
what follows is handed on untouched, whatever it looks like.

The library never imports this package: flags are global to a process, and those of a command are no
user's business.
"""

from __future__ import annotations

from typing import Final

COMMANDS: Final[dict[str, str]] = {
    "bench": "Train your own model on one device and on several, and compare the times.",
    "cluster": "Check TF_CONFIG, and that the workers it names can reach each other.",
    "demo": "Train on handwritten digits on one device and on all of them, and compare the two.",
    "devices": "List the devices that TensorFlow sees, and check the copies between them.",
    "explain": "Say where the time of a training step of a saved model goes.",
    "serve": "Lend this machine's devices to a script on another machine.",
    "verify": "Say whether a model on several devices gives the numbers of one.",
    "workers": "Run a script several times on this machine, each time as another worker.",
}
"""Each command with the line that stands for it in the list of commands."""


EXIT_FAILURE: Final = 1
"""What the process ends with when a command failed."""


class CommandError(Exception):
    """A failure that the user can mend; its text is one line that also says how."""
