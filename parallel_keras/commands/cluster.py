"""Checks TF_CONFIG, and that the workers it names can reach each other.

Run it on every worker before the training script, at the same time: it opens the port of the
worker's own address, calls the others, and ends when all have called each other. Where that does
not happen within the timeout, it names each worker that is missing, with its address and the
reason. TensorFlow itself would wait without a word.
"""

from __future__ import annotations

import time
from typing import Final

from absl import flags

from parallel_keras.commands import CommandError

_TIMEOUT: Final = flags.DEFINE_float(
    "timeout", 60.0, "Seconds to wait for the other workers.", lower_bound=0.0
)


def main() -> None:
    """Runs the check."""
    from parallel_keras.workers.roll_call import check_workers

    start = time.monotonic()
    try:
        found = check_workers(_TIMEOUT.value)
    except (OSError, ValueError) as error:
        raise CommandError(error) from error
    seconds = time.monotonic() - start
    others = ", ".join(map(str, found.others)) or "no other worker"
    print(f"This is {found.own}. It reached, and was reached by, {others} in {seconds:.1f} s.")
