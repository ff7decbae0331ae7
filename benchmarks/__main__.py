"""Measures, prints the table, and makes the plots and the tables of the documents.

`python -m benchmarks` measures everything and wants a machine on which nothing else runs. Names of
sections measure those alone and leave what was measured of the others:

    python -m benchmarks core        speed, first step, memory and graphs: 15 minutes
    python -m benchmarks links       devices behind links of a chosen speed: 8 minutes, needs root
    python -m benchmarks frameworks  Keras on JAX and PyTorch: 8 minutes, needs their environments
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import tensorflow as tf
from absl import app, flags, logging

import parallel_keras as pk
from benchmarks import judge, speed, start, tables
from benchmarks.frameworks import race
from benchmarks.links import laboratory, namespaces
from benchmarks.settings import FULL, QUICK, Settings
from parallel_keras import hardware

_QUICK = flags.DEFINE_bool("quick", False, "Measure less, in under 3 minutes; documents stay.")
_DEVICES = flags.DEFINE_enum("devices", "CPU", ["CPU", "GPU"], "What the towers run on.")
_RENDER = flags.DEFINE_bool("render", False, "Measure nothing, make plots and tables anew.")
_RESULTS = flags.DEFINE_string("results", None, "The file of results.")

ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """What the results depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": cores,
        "processor": _processor(),
        "system": platform.system(),
        "python": platform.python_version(),
        "tensorflow": metadata.version("tensorflow"),
        "keras": metadata.version("keras"),
        "parallel_keras": pk.__version__,
    }


def core(settings: Settings) -> judge.Results:
    """What needs nothing but this library."""
    results: judge.Results = {"speed": {}}
    logging.info("overhead on one device")
    results["overhead"] = _alone("benchmarks.overhead", str(settings.overhead_rounds))
    logging.info("graph")
    results["graph"] = _alone("benchmarks.graph")
    for workload in settings.workloads:
        logging.info("speed: %s", workload)
        results["speed"][workload] = speed.measure(workload, settings)
    if settings.start_rounds:
        logging.info("first step and memory")
        results["start"] = start.measure(settings)
    if settings.cycles:
        results["steady"] = {}
        for peer in ("bare", "ours"):
            logging.info("memory over time: %s", peer)
            results["steady"][peer] = _alone("benchmarks.steady", peer, str(settings.cycles))
    return results


def links(settings: Settings) -> judge.Results:
    """What needs network namespaces."""
    runs = laboratory.QUICK if settings.quick else laboratory.FULL
    return {"links": laboratory.measure(runs)}


def frameworks(settings: Settings) -> judge.Results:
    """What needs the environments of other frameworks."""
    return {"frameworks": race.measure(1 if settings.quick else 3)}


SECTIONS = {"core": core, "links": links, "frameworks": frameworks}


def measure(sections: Sequence[str], settings: Settings) -> judge.Results:
    """Measures sections, one after the other, and notes when each was measured."""
    results: judge.Results = {"sections": {}}
    for name in sections:
        began, before = time.perf_counter(), _load()
        results |= SECTIONS[name](settings)
        results["sections"][name] = {
            "command": f"python -m benchmarks {name}" + " --quick" * settings.quick,
            "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
            "minutes": (time.perf_counter() - began) / 60,
            "load": [before, _load()],
        }
    return results


def asked_for(arguments: Sequence[str], *, quick: bool, gpus: bool) -> list[str]:
    """The sections to measure.

    Those that are named; else all that this machine can, but only the core of a quick run, and of
    one on GPUs, as the others put their devices on CPUs.
    """
    unknown = sorted(set(arguments) - set(SECTIONS))
    if unknown:
        raise app.UsageError(f"No such section: {unknown}. There are {list(SECTIONS)}.")
    if arguments or quick or gpus:
        return list(arguments) or ["core"]
    able = ["core"]
    try:
        namespaces.check()
        able.append("links")
    except namespaces.NoLaboratory as reason:
        logging.warning("links are left out: %s", reason)
    if race.missing():
        logging.warning("frameworks are left out; make bench-frameworks measures them")
    else:
        able.append("frameworks")
    return able


def merged(old: judge.Results, new: judge.Results) -> judge.Results:
    """What was measured anew, beside what was not.

    >>> merged({"a": 1, "sections": {"x": 1}}, {"b": 2, "sections": {"y": 2}})
    {'a': 1, 'sections': {'x': 1, 'y': 2}, 'b': 2}
    """
    return {**old, **new, "sections": {**old.get("sections", {}), **new["sections"]}}


def check_gpus() -> None:
    """Whether there is a GPU to measure on.

    Raises:
        SystemExit: If not.
    """
    seen = len(tf.config.list_physical_devices("GPU"))
    if seen == 0:
        built = hardware.built_for_gpus()
        reasons = hardware.why_no_gpus(0, hardware.driver_cards(), os.environ, built=built)
        sys.exit(f"No GPU was found, so nothing was measured. {' '.join(reasons)}")
    if seen == 1:
        logging.warning("There is one GPU: it is split, so two towers share what one has alone.")


def show(results: judge.Results) -> None:
    """Prints the table of the bars, as text."""
    for row in judge.rows(results):
        print(f"{row.verdict:<6}{row.measure}: {row.figure}" + (row.bar and f"  [{row.bar}]"))
    for name, run in results["sections"].items():
        print(f"Load of the machine before and after {name}: {run['load']}")


def main(argv: list[str]) -> None:
    """Measures, writes, prints."""
    quick, gpus = _QUICK.value, _DEVICES.value == "GPU"
    if gpus:
        check_gpus()
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    path = _path(quick=quick, gpus=gpus)
    results = json.loads(path.read_text()) if path.exists() else {}
    if not _RENDER.value:
        sections = asked_for(argv[1:], quick=quick, gpus=gpus)
        try:
            found = measure(sections, QUICK if quick else FULL)
        except namespaces.NoLaboratory as reason:
            sys.exit(str(reason))
        results = merged(results, {**found, "machine": machine()})
        path.write_text(json.dumps(results, indent=1) + "\n")
    if not (quick or gpus):
        from benchmarks import plots  # needs matplotlib, which a quick run does not

        plots.draw(results, ROOT / "docs" / "plots")
        tables.fill_documents(ROOT, results)
    show(results)


def _path(*, quick: bool, gpus: bool) -> Path:
    if _RESULTS.value:
        return Path(_RESULTS.value)
    return ROOT / "benchmarks" / f"results{'-gpu' * gpus}{'-quick' * quick}.json"


def _alone(module: str, *arguments: str) -> Any:
    """What a module prints as JSON, run in a process of its own."""
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        env={"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ},
        text=True,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"{module} failed:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def _load() -> float:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    app.run(main)
