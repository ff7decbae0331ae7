"""Which axes of the outputs follow the rows: what can be merged by rows, and what cannot."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from parallel_keras.graphs.origin import Spot, body_and_inputs, depends_on_rows
from parallel_keras.nests import flatten, flatten_with_paths

# For each axis whether its size follows the number of rows; `None` where nobody knows.
Axes = list[bool | None]
_OUTPUT = re.compile(r"output (\d+/[\w/]+)")
# Two numbers of rows that are not each other's multiples.
_FEW, _MORE = 4, 7
_OF_NUMBERS = ("max", "min", "sum")


class Given(NamedTuple):
    """What is known of a call besides what the towers returned.

    Attributes:
        counts: How many rows each tower here has.
        leaves: The tensors with rows that the first of them was given, also ragged and sparse.
        sizes: Function from a number of rows to outputs of that many, a nest of things with a
            `shape`. It calls the template once more, symbolically.
        known: What a functional template knows of its outputs: the shape of each leaf.
        left: Function from a number of rows to what is left on layers then, see `left_behind`.
        layer: Function from the path of what is left to what an error says of it.
        joins: Function that gives what joins the leaves of outputs, see `towers.probe`.
        penalty: Function from the number of a layer, and its activity over the whole batch, to
            what its activity regulariser makes of that.
        kind: Function from the path of a single number that is left to how it depends on the
            rows, see `Move`.
        rows_left: Function that tells where a call has left the number of its rows as a Python
            integer: pairs of the number of a layer and the name of an attribute.
    """

    counts: list[Any]
    leaves: list[Any]
    sizes: Callable[[int], Any]
    known: list[tuple[int | None, ...]]
    left: Callable[[int], Any]
    layer: Callable[[str], str]
    joins: Callable[[], list[str]]
    penalty: Callable[[str, tf.Tensor], tf.Tensor]
    kind: Callable[[str], str]
    rows_left: Callable[[], list[tuple[str, str]]]

    def of_left(self) -> Given:
        """What is known of what is left on layers, instead of the outputs."""
        return self._replace(sizes=self.left, known=[], joins=list)

    def on_layers(self, message: str) -> str:
        """What an error about an output says where it is about what was left on a layer."""
        return _OUTPUT.sub(lambda found: self.layer(found[1]), message)

    def has_rows_alone(self, index: int) -> bool:
        """Whether an output is known to have rows on its first axis, and on no other."""
        if index >= len(self.known):
            return False
        first, *inner = self.known[index] or (0,)
        return first is None and None not in inner

    @property
    def tensors(self) -> list[tf.Tensor]:
        """The tensors, those inside of ragged and sparse ones too."""
        return [leaf for leaf in flatten(self.leaves) if isinstance(leaf, tf.Tensor)]


def found_rules(parts: Sequence[Any], rules: Mapping[str, str], given: Given) -> dict[int, str]:
    """By which rules leaves of the outputs are merged that do not have rows.

    Only outputs that may not have the rows on their first axis alone cost anything: what the
    towers' graphs know of their sizes is enough for all others.

    Args:
        parts: For each tower here its outputs.
        rules: What was declared, by the name of an output.
        given: What else is known.

    Returns:
        By the number of a leaf `"whole"`, if it is the same on every tower, or what joins
        numbers.

    Raises:
        ValueError: If a leaf can be merged by no rule, naming it.
    """
    flat = [flatten_with_paths(part) for part in parts]
    leaves = flat[0]
    columns = [[leaf for _, leaf in column] for column in zip(*flat, strict=True)]
    open_ = [
        index
        for index, (path, _) in enumerate(leaves)
        if (str(path[-1]) if path else "output") not in rules and not given.has_rows_alone(index)
    ]
    found = _of_scalars(columns, open_, given)
    doubtful = [index for index in open_ if is_doubtful(columns[index], given.counts)]
    if not doubtful:
        return found
    following = _following([leaf for _, leaf in leaves], doubtful, given)
    for index in doubtful:
        path, leaf = leaves[index]
        axes = following.get(index, [None] * leaf.shape.rank)
        if axes[0] is False and is_same(columns[index], given.tensors):
            found[index] = "whole"
        else:
            _check(path, leaf, axes)
            if _is_more(columns[index], given.counts) and _answer(index, given) == "mixed":
                _refuse_order(path, leaf)
    return found


def _of_scalars(columns: list[list[Any]], chosen: list[int], given: Given) -> dict[int, str]:
    """What joins the numbers among the outputs, but for means."""
    scalars = [index for index in chosen if _may_be_joined(columns[index][0])]
    answers = {index: _answer(index, given) for index in scalars}
    return {index: answer for index, answer in answers.items() if answer in _OF_NUMBERS}


def _may_be_joined(first: Any) -> bool:
    """Whether an output is a number: also a constant may be how many rows there are."""
    if isinstance(first, tf.Tensor):
        return bool(first.shape.rank == 0 and first.dtype != tf.string)
    return isinstance(first, (int, float)) and not isinstance(first, bool)


def _answer(index: int, given: Given) -> str:
    return dict(enumerate(given.joins())).get(index, "unknown")


def _is_more(column: Sequence[tf.Tensor], rows: Sequence[Any]) -> bool:
    """Whether an output is not known to have one value for each row."""
    return any(one.shape[0] != count for one, count in zip(column, rows, strict=False))


def _refuse_order(path: tuple[Any, ...], leaf: tf.Tensor) -> None:
    raise ValueError(
        f"Expected the rows of the batch in order on the first axis of {_named(path)}: each device "
        f"has only a part of them. Received: shape={tuple(leaf.shape)} from a tower, with several "
        "values for a row that are not next to each other, or made of several rows, as "
        "tf.concat([a, b], axis=0) and tf.tile do. Return them as outputs of their own, or "
        "beside each other on another axis, and put them together after the merge."
    )


def is_doubtful(column: Sequence[Any], rows: Sequence[Any]) -> bool:
    """Whether an output may have no rows, or have them on another axis than the first.

    Args:
        column: What each tower returned, or only some towers.
        rows: How many rows each has.

    Returns:
        `False` if the sizes that are known while tracing show that rows come first.
    """
    first = column[0]
    if not isinstance(first, tf.Tensor) or not first.shape.rank:
        return False
    size, *inner = first.shape
    if size is None or not isinstance(rows[0], int):
        return size is not None or None in inner
    known = [(one.shape, count) for one, count in zip(column, rows, strict=False)]
    if len({count for _, count in known}) > 1:  # The sizes of two towers tell.
        inners = {tuple(shape[1:]) for shape, _ in known}
        ratios = {None if shape[0] is None else shape[0] / count for shape, count in known}
        return len(inners) > 1 or ratios != {1.0}
    return size != rows[0] or any(axis is None or axis % rows[0] == 0 for axis in inner)


def are_rows(leaves: Sequence[Any], given: Given) -> bool:
    """Whether outputs have the rows on their first axis, and on no other, as far as is known.

    Args:
        leaves: The outputs of one tower.
        given: What else is known.
    """
    doubtful = [
        index
        for index, leaf in enumerate(leaves)
        if not given.has_rows_alone(index) and is_doubtful([leaf], given.counts)
    ]
    following = _following(leaves, doubtful, given) if doubtful else {}
    return all(map(_are_rows, following.values()))


def are_by_rows(column: Sequence[tf.Tensor], given: Given) -> bool:
    """Whether a term of the loss has a value for each row, which then are added up.

    Args:
        column: The term of each tower here.
        given: What is known of the call.

    Raises:
        ValueError: If it is about pairs of rows.
    """
    first, counts = column[0], given.counts
    if not first.shape.rank:
        return False
    rows = counts[0]
    if isinstance(rows, int) and len(set(counts)) > 1:
        return len({one.shape[0] / count for one, count in zip(column, counts, strict=True)}) == 1
    found = [] if tf.executing_eagerly() else _axes_of(lambda n: _sizes_in_graph([first], given, n))
    if found:
        _check(("add_loss",), first, [found[0][0] or None, *found[0][1:]])
        return bool(found[0][0])
    return first.shape[0] is None or (isinstance(rows, int) and first.shape[0] % rows == 0)


def _following(leaves: Sequence[Any], doubtful: list[int], given: Given) -> dict[int, Axes]:
    """For the doubtful leaves, which of their axes follow the rows; empty if nobody knows."""
    found: list[Axes] = []
    if not tf.executing_eagerly():
        chosen = [leaves[index] for index in doubtful]
        found = _axes_of(lambda rows: _sizes_in_graph(chosen, given, rows))
    if isinstance(given.counts[0], int) and not (found and all(map(_are_rows, found))):
        # What was computed from a size that is known while tracing is a constant in the graph.
        found = _axes_of(lambda rows: _symbolic_sizes(doubtful, given, rows)) or found
    return dict(zip(doubtful, found, strict=False))


def _axes_of(sizes: Callable[[int], list[Any]]) -> list[Axes]:
    """For each output the axes that follow the rows; empty if that cannot be found out."""
    try:
        pairs = zip(sizes(_FEW), sizes(_MORE), strict=True)
        return [_axes(tuple(few), tuple(more)) for few, more in pairs]
    except Exception:  # noqa: BLE001 (what cannot be asked for other sizes may do anything)
        return []


def _symbolic_sizes(doubtful: list[int], given: Given, rows: int) -> list[Any]:
    leaves = flatten_with_paths(given.sizes(rows))
    return [leaves[index][1].shape for index in doubtful]


def _are_rows(axes: Axes) -> bool:
    return axes[0] is not False and not any(axes[1:])


def _axes(few: Sequence[int | None], more: Sequence[int | None]) -> Axes:
    axes: Axes = [
        None if one is None or other is None else one != other
        for one, other in zip(few, more, strict=True)
    ]
    # One row more or less than there are, or one for each pair, is no row for each either.
    if axes[0] and few[0] is not None and more[0] is not None:
        axes[0] = few[0] * _MORE == more[0] * _FEW
    return axes


def _sizes_in_graph(leaves: Sequence[tf.Tensor], given: Given, rows: int) -> list[Any]:
    """Has TensorFlow work the sizes out for another number of rows, from the graph it has."""
    resized = [pair for leaf in given.leaves for pair in _resized(leaf, rows)]
    graph, outs, inputs = body_and_inputs(leaves, [tensor for tensor, _ in resized])
    shapes = {tensor.name: shape for tensor, shape in resized}
    definition = graph.as_graph_def()
    with tf.Graph().as_default():
        news = {
            inner.name: tf.compat.v1.placeholder(inner.dtype, shapes[source])
            for inner, source in inputs
        }
        names = [out.name for out in outs]
        found = tf.graph_util.import_graph_def(
            definition, input_map=news, return_elements=names, name=""
        )
        return [tensor.shape for tensor in found]


def _resized(leaf: Any, rows: int) -> list[tuple[tf.Tensor, list[int | None]]]:
    """The tensors that an input is made of, and their shapes for another number of rows."""
    if isinstance(leaf, tf.Tensor):
        return [(leaf, [rows, *leaf.shape[1:]])]
    parts = tf.nest.flatten(leaf, expand_composites=True)
    shapes = [[None, *part.shape[1:]] for part in parts]
    if isinstance(leaf, tf.RaggedTensor):
        outer = next(i for i, part in enumerate(parts) if part is leaf.row_splits)
        shapes[outer] = [rows + 1]
    return list(zip(parts, shapes, strict=True))


def is_same(column: Sequence[Any], sources: Sequence[tf.Tensor]) -> bool:
    """Whether what each tower returned is the same, as it does not depend on the rows.

    Args:
        column: What each tower returned.
        sources: What the first one was given.
    """
    if tf.executing_eagerly():
        first = column[0]
        return all(
            one.shape == first.shape and bool(tf.reduce_all(tf.equal(one, first))) for one in column
        )
    return not depends_on_rows(Spot(column[0]), sources)


def _named(path: tuple[Any, ...]) -> str:
    return f"output {'/'.join(map(str, path))}" if path else "the output"


def _check(path: tuple[Any, ...], leaf: tf.Tensor, axes: Axes) -> None:
    name = _named(path)
    received = f"Received: shape={tuple(leaf.shape)} from a tower."
    others = [axis for axis, follows in enumerate(axes) if axis and follows]
    if others:
        raise ValueError(
            f"Expected the rows of the batch on the first axis of {name}, and on no other: each "
            f"device has only a part of them. {received} Its size follows the rows on axis "
            f"{', '.join(map(str, others))}{' too' if axes[0] else ', not on the first'}. If rows "
            "are on another axis, transpose the output. If it is about pairs of rows, return what "
            "the pairs are made of, and make them of the merged outputs: in the loss, or after "
            "predict."
        )
    if axes[0] is False:
        raise ValueError(
            f"Expected the first axis of {name} to be the batch. {received} Its size does not "
            "follow the number of rows, but it is made of them, and each device has only a part: "
            "no rule can make one value of those. Return what it is made of, with the rows first, "
            "and compute it from the merged outputs."
        )
