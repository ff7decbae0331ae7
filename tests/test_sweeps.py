"""In which order tests run, and which cases of a sweep `make test` runs."""

from pathlib import Path

from tests.sweeps import FIRST, spread

CASES = [(loss, path) for loss in "abc" for path in ("towers", "merged")]


def test_every_value_is_among_the_cases() -> None:
    taken = [CASES[index] for index in spread(CASES, 3)]
    assert {loss for loss, _ in taken} == set("abc")
    assert {path for _, path in taken} == {"towers", "merged"}


def test_all_are_taken_where_there_are_few() -> None:
    assert sorted(spread(CASES, 10)) == list(range(6))


def test_what_comes_first_is_there() -> None:
    files = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    assert [name for name in FIRST if name not in files] == []
