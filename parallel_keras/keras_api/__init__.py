"""The wrapper as a good Keras citizen: what it answers, saves, logs, and its loops."""
