"""Tests that fail and whose faults are not mended yet: a list to make empty.

Each is the beginning of the id of a test, and what is wrong. They are run, and may fail.
"""

KNOWN: dict[str, str] = {}
