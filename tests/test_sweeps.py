"""Which cases of a sweep `make test` runs."""

from tests.sweeps import spread

CASES = [(loss, path) for loss in "abc" for path in ("towers", "merged")]


def test_every_value_is_among_the_cases() -> None:
    taken = [CASES[index] for index in spread(CASES, 3)]
    assert {loss for loss, _ in taken} == set("abc")
    assert {path for _, path in taken} == {"towers", "merged"}


def test_all_are_taken_where_there_are_few() -> None:
    assert sorted(spread(CASES, 10)) == list(range(6))
