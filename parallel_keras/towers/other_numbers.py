"""What gives other numbers than one device: no error, as it may be meant so, but the log tells.

| found in the graph of a tower                          | what it leads to                     |
|--------------------------------------------------------|--------------------------------------|
| what goes over the first axis, in layers of the user's | the model is asked, and the log told |
| numbers for each row, drawn from a constant seed       | the log is told                      |
"""

from __future__ import annotations

from parallel_keras.graphs.graph import depends_on
from parallel_keras.graphs.mixing import may_mix
from parallel_keras.towers.naming import Names
from parallel_keras.towers.recompute import values_are_known
from parallel_keras.towers.saying import warn_once
from parallel_keras.towers.trace import Trace


def tell(trace: Trace) -> None:
    """Tells the log which numbers of a tower will not be those of one device.

    Args:
        trace: The tower that was just traced.
    """
    if not trace.alone:
        _mixed_rows(trace)
        _constant_seeds(trace)


def _mixed_rows(trace: Trace) -> None:
    """Layers that look at several rows at once."""
    names = Names(trace.tower.template)
    parts = trace.parts()
    found = (
        op
        for op, tensors in may_mix(trace.by_type, names.may_mix)
        if any(depends_on(tensor, parts) for tensor in tensors)
    )
    op = next(found, None)
    if op is None or not values_are_known():
        return
    joins = trace.tower.joins()
    if joins and "mixed" not in joins:
        return
    layer = names.layer(op.name)
    sure = (
        "Other numbers than on one device: the outputs of %s for a batch are not those for its "
        "parts, so it looks at several rows at once, likely in layer %r (%s), and each device has "
        "only some of them. Compute it from the merged outputs, in the loss or in a train_step of "
        "the model's own. parallel_keras.verify(parallel, batch) shows what differs."
    )
    unsure = (
        "Maybe other numbers than on one device: %s may look at several rows at once in layer %r "
        "(%s), of which each device has only some. It could not be tried on a few random rows. "
        "parallel_keras.verify(parallel, batch) shows whether something differs."
    )
    warn_once(
        trace.tower.template,
        sure if joins else unsure,
        trace.tower.template.name,
        layer.name if layer is not None else "",
        op.type,
    )


def _constant_seeds(trace: Trace) -> None:
    """Random numbers for rows that are the same wherever they are drawn."""
    seeded = trace.by_type["StatelessRandomGetKeyCounter"]
    if not seeded:
        return
    parts = trace.parts()
    rows = {tensor.shape[0] for tensor in parts if tensor.shape.rank} - {None}
    given = [op.outputs[0] for op in trace.by_type["Placeholder"]]
    for op in seeded:
        if depends_on(op.inputs[0], given):
            continue
        draws = [user for user in op.outputs[0].consumers() if user.type.startswith("Stateless")]
        by_rows = [
            draw
            for draw in draws
            if draw.outputs[0].shape.rank != 0
            and (depends_on(draw.inputs[0], parts) or draw.outputs[0].shape[:1][0] in rows)
        ]
        if by_rows:
            layer = Names(trace.tower.template).layer(op.name)
            warn_once(
                trace.tower.template,
                "Other numbers than on one device: %s draws random numbers for each row from a "
                "constant seed (%s), so each device draws the same ones for its rows. Draw them "
                "with a keras.random.SeedGenerator, which gives each device a stream of its own.",
                f"layer {layer.name!r}" if layer is not None else trace.tower.template.name,
                by_rows[0].type,
            )
            return
