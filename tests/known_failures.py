"""Tests that fail and whose faults are not mended yet: a list to make empty.

Each is the beginning of the id of a test, and what is wrong. They are run, and may fail.
"""

KNOWN = {
    "tests/test_explain.py::test_put_back_after_a_failure": (
        "a step that a test puts into an instance counts as one of its own"
    ),
    "tests/test_verify.py::test_finds_what_only_state_or_the_loss_shows[PastRows]": (
        "refused in the first step now, which verify does not catch"
    ),
    "tests/test_faults_outputs.py::test_what_cannot_be_merged[": (
        "shapes that do not fit fail before they are named, without a graph"
    ),
}
