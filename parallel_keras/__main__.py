"""`python -m parallel_keras <command> [flags] [arguments]`."""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from absl import app, flags, logging

from parallel_keras import __version__
from parallel_keras.commands import COMMANDS, EXIT_FAILURE, CommandError

EXIT_USAGE = 2
# What shells say of a program that a signal ended.
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_PIPE = 128 + getattr(signal, "SIGPIPE", 13)
_HELP = {"-h", "-help", "--help"}
_VERSION = {"-version", "--version"}


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
            "The version of this library: python -m parallel_keras --version",
        ]
    )


def _fail(name: str, message: object) -> NoReturn:
    line = " ".join(str(message).split())
    print(f"parallel_keras {name}: {line}", file=sys.stderr)
    sys.exit(EXIT_FAILURE)


def _parameters(command: ModuleType) -> list[inspect.Parameter]:
    return list(inspect.signature(command.main).parameters.values())


def _takes_any(command: ModuleType) -> bool:
    """Returns whether the command hands on what follows its arguments, flags included."""
    return any(each.kind is each.VAR_POSITIONAL for each in _parameters(command))


def _placeholder(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return f" [{parameter.name} ...]"
    if parameter.default is parameter.empty:
        return f" <{parameter.name}>"
    return f" [{parameter.name}]"


def _synopsis(name: str, command: ModuleType) -> str:
    arguments = "".join(map(_placeholder, _parameters(command)))
    return f"python -m parallel_keras {name} [flags]{arguments}"


def _help(name: str, command: ModuleType) -> str:
    return "\n".join(
        [
            f"Usage: {_synopsis(name, command)}",
            "",
            (command.__doc__ or "").strip(),
            "",
            flags.FLAGS.module_help(command),
        ]
    )


def _asks_for_help(command: ModuleType, arguments: Sequence[str]) -> bool:
    if _takes_any(command):
        arguments = list(itertools.takewhile(lambda each: each.startswith("-"), arguments))
    return not _HELP.isdisjoint(arguments)


def _parse(name: str, command: ModuleType, argv: list[str]) -> list[str]:
    """Takes the flags out of the command line, and checks the number of what is left."""
    see = f"See: python -m parallel_keras {name} --help"
    flags.FLAGS.set_gnu_getopt(not _takes_any(command))
    try:
        program, *arguments = flags.FLAGS(argv)
    except flags.Error as error:
        _fail(name, f"{error}. {see}")
    try:
        inspect.signature(command.main).bind(*arguments)
    except TypeError:
        _fail(
            name,
            f"The arguments do not fit. Expected: {_synopsis(name, command)}. "
            f"Received: arguments={arguments}. {see}",
        )
    return [program, *arguments]


def _run(name: str, command: ModuleType, arguments: Sequence[str]) -> NoReturn:
    """Parses the flags of a command, runs it, and ends the process."""

    def main(argv: list[str]) -> int | None:
        try:
            code: int | None = command.main(*argv[1:])
            sys.stdout.flush()
        except CommandError as error:
            _fail(name, error)
        except BrokenPipeError:
            raise
        except Exception as error:
            logging.debug("The traceback:", exc_info=True)
            _fail(
                name,
                f"{type(error).__name__}: {error} "
                f"(To see where: python -m parallel_keras {name} --verbosity=1)",
            )
        return code

    if not _takes_any(command):  # What a script logs is its own business.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    app.run(
        main,
        argv=[f"parallel_keras {name}", *arguments],
        flags_parser=lambda argv: _parse(name, command, argv),
    )
    sys.exit()  # Not reached, as app.run() ends the process; mypy cannot know.


def console() -> NoReturn:
    """Runs the command that the command line names, and ends the process.

    Exits with 0 when the command succeeded, 1 or what the command returned when it failed, 2 when
    there is no such command, and 130 after Ctrl-C.
    """
    name, *arguments = sys.argv[1:] or [""]
    try:
        _dispatch(name, arguments)
    except KeyboardInterrupt:
        print(f"\nparallel_keras {name}: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `head` does. Python would try once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_PIPE)


def _dispatch(name: str, arguments: list[str]) -> NoReturn:
    if name in ("help", *_HELP):
        print(usage(), flush=True)
        sys.exit()
    if name in _VERSION:
        print(f"parallel_keras {__version__}")
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
    if _asks_for_help(command, arguments):
        print(_help(name, command), flush=True)
        sys.exit()
    _run(name, command, arguments)


if __name__ == "__main__":
    console()
