"""Tests that fail and whose faults are not mended yet: a list to make empty.

Each is the beginning of the id of a test, and what is wrong. They are run, and may fail.
"""

KNOWN = {
    "tests/test_faults_trainer.py::test_layers_of_a_model_that_takes_no_training[True-": (
        "run_eagerly: numpy has no `export` in a tower of this model"
    ),
    "tests/test_faults_own_loops.py::test_steps_run_on_all_towers": (
        "len() of a symbolic tensor, in a template with loops of its own"
    ),
    "tests/test_faults_own_loops.py::test_tasks_as_those_of_keras_hub[CausalLM-": (
        "`generate` of a stand-in: `numpy.export` in a tower"
    ),
    "tests/test_explain.py::test_put_back_after_a_failure": (
        "a step that a test puts into an instance counts as one of its own"
    ),
    "tests/test_faults_state.py::test_state_outside_of_keras_is_refused[table-": (
        "a table is refused in other words than the test expects"
    ),
    "tests/test_verify.py::test_finds_what_only_state_or_the_loss_shows[PastRows]": (
        "refused in the first step now, which verify does not catch"
    ),
    "tests/test_faults_outputs.py::test_what_cannot_be_merged[": (
        "shapes that do not fit fail before they are named, without a graph"
    ),
}
