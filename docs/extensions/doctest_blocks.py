"""Lets the API page show the examples of docstrings as code.

Docstrings are written as Keras writes its own: examples stand unindented below `Example:`. Markdown
takes `>>>` for three quotations in one another, and runs the lines together.
"""

import re

import griffe

# Lines that are typed and what they print, up to the next empty line.
EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.M)


def fence(docstring: str) -> str:
    """Puts each block of typed lines between the marks of a code block."""
    return EXAMPLE.sub(lambda match: f"\n```pycon\n{match[0]}\n```\n", docstring)


class DoctestBlocks(griffe.Extension):
    """Does so for all that is documented."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = fence(obj.docstring.value)
