"""Times a model on several numbers of devices, side by side in processes of their own.

`clock` takes the times and does the arithmetic, `runner` is the process that trains, `rounds`
starts runners and lets them take turns, `subject` makes what `bench` asks for: `models` loads a
model, `random_batch` makes rows for it. The library never imports this package; the commands and
benchmarks/ do.
"""
