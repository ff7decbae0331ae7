"""Flags that several commands have, each defined once: one spelling, one default, one meaning."""

from __future__ import annotations

from absl import flags

# They belong to the command that calls these functions, and are shown in its help.
flags.disclaim_key_flags()


def define_model() -> flags.FlagHolder[str | None]:
    """The model, for those who would rather name it by a flag."""
    return flags.DEFINE_string("model", None, "The same as the argument <model>.")


def define_devices() -> flags.FlagHolder[int | None]:
    """How many devices."""
    return flags.DEFINE_integer(
        "devices",
        None,
        "How many devices to use. By default, all GPUs, or two logical CPUs if there is no GPU.",
        lower_bound=1,
    )


def define_batch_size() -> flags.FlagHolder[int]:
    """Rows of a batch."""
    return flags.DEFINE_integer(
        "batch-size", 32, "Rows of a batch, of all devices together.", lower_bound=1
    )


def define_open_size() -> flags.FlagHolder[int]:
    """The size of open axes."""
    return flags.DEFINE_integer(
        "open-size",
        128,
        "The size of axes that the model leaves open, such as the length of a text.",
        lower_bound=1,
    )


def define_loss() -> flags.FlagHolder[str | None]:
    """The name of a loss."""
    return flags.DEFINE_string(
        "loss", None, "The name of a loss. By default the model's own, else the mean squared error."
    )


def define_imports() -> flags.FlagHolder[list[str]]:
    """Modules with classes of the model."""
    return flags.DEFINE_list(
        "imports", [], "Modules to import first: those that register the model's own layers."
    )


def define_json() -> flags.FlagHolder[bool]:
    """For scripts."""
    return flags.DEFINE_bool("json", False, "Print the result as JSON, and nothing else.")
