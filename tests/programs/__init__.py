"""Small programs of the kinds that people write with Keras, by family.

Each is a function that makes a `Program`: a compiled model and its data. They are written as they
are written elsewhere (subclassed models with steps of their own, trackers, `add_loss`, `assign`,
`tf.*` and `keras.ops` side by side), not to suit this library.
"""
