"""`python -m parallel_keras <command> [flags]`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from absl import app, flags, logging

from parallel_keras.commands import COMMANDS, CommandError

EXIT_FAILURE = 1
EXIT_USAGE = 2


def usage() -> str:
    """Returns how to call the program, with the list of its commands."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "Usage: python -m parallel_keras <command> [flags]",
            "",
            "Commands:",
            *(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items()),
            "",
            "The flags of a command: python -m parallel_keras <command> --help",
        ]
    )


def _fail(name: str, message: object) -> NoReturn:
    line = " ".join(str(message).split())
    print(f"parallel_keras {name}: {line}", file=sys.stderr)
    sys.exit(EXIT_FAILURE)


def _help(name: str, command: ModuleType) -> str:
    return "\n".join(
        [
            f"Usage: python -m parallel_keras {name} [flags]",
            "",
            (command.__doc__ or "").strip(),
            "",
            flags.FLAGS.module_help(command),
        ]
    )


def _run(name: str, command: ModuleType, arguments: Sequence[str]) -> NoReturn:
    """Parses the flags of a command, runs it, and ends the process."""

    def parse(argv: list[str]) -> list[str]:
        try:
            rest: list[str] = flags.FLAGS(argv)[1:]
        except flags.Error as error:
            _fail(name, f"{error}. See: python -m parallel_keras {name} --help")
        if rest:
            _fail(
                name,
                f"The command takes flags only. Received: arguments={rest}. "
                f"See: python -m parallel_keras {name} --help",
            )
        return argv[:1]

    def main(_: list[str]) -> None:
        try:
            command.main()
        except CommandError as error:
            _fail(name, error)
        except Exception as error:
            logging.debug("The traceback:", exc_info=True)
            _fail(
                name,
                f"{type(error).__name__}: {error} "
                f"(To see where: python -m parallel_keras {name} --verbosity=1)",
            )

    app.run(main, argv=[f"parallel_keras {name}", *arguments], flags_parser=parse)
    sys.exit()  # Not reached, as app.run() ends the process; mypy cannot know.


def console() -> NoReturn:
    """Runs the command that the command line names, and ends the process.

    Exits with 0 when the command succeeded, 1 when it failed, and 2 when there is no such command.
    """
    name, *arguments = sys.argv[1:] or [""]
    if name in ("help", "-h", "-help", "--help"):
        print(usage())
        sys.exit()
    if name not in COMMANDS:
        print(usage(), file=sys.stderr)
        if name:
            print(
                f"\nNo such command. Expected: one of {list(COMMANDS)}. Received: command={name!r}",
                file=sys.stderr,
            )
        sys.exit(EXIT_USAGE)
    # Only the one command, so that two commands may each define a flag of the same name.
    command = importlib.import_module(f"parallel_keras.commands.{name}")
    if {"-h", "-help", "--help"}.intersection(arguments):
        print(_help(name, command))
        sys.exit()
    _run(name, command, arguments)


if __name__ == "__main__":
    console()
