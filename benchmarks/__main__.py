"""Measures everything, prints the table, and makes the plots and the tables of the documents.

`python -m benchmarks` takes about 15 minutes and wants a machine on which nothing else runs.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import app, flags, logging

import parallel_keras as pk
from benchmarks import judge, speed, start, tables
from benchmarks.settings import FULL, QUICK, Settings

_QUICK = flags.DEFINE_bool("quick", False, "Measure less, in under 3 minutes; documents stay.")
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


def measure(settings: Settings) -> judge.Results:
    """Everything, one after the other."""
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


def show(results: judge.Results) -> None:
    """Prints the table of the bars, as text."""
    for row in judge.rows(results):
        print(f"{row.verdict:<6}{row.measure}: {row.figure}" + (row.bar and f"  [{row.bar}]"))
    print(f"Load of the machine before and after: {results['load']}")


def main(argv: list[str]) -> None:
    """Measures, writes, prints."""
    del argv
    settings = QUICK if _QUICK.value else FULL
    name = "results-quick.json" if _QUICK.value else "results.json"
    path = Path(_RESULTS.value) if _RESULTS.value else ROOT / "benchmarks" / name
    if _RENDER.value:
        results = json.loads(path.read_text())
    else:
        began, before = time.perf_counter(), _load()
        results = measure(settings)
        results["load"] = [before, _load()]
        results["machine"] = machine()
        results["command"] = "python -m benchmarks" + " --quick" * settings.quick
        results["date"] = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
        results["minutes"] = (time.perf_counter() - began) / 60
        path.write_text(json.dumps(results, indent=1) + "\n")
    if not settings.quick:
        from benchmarks import plots  # needs matplotlib, which a quick run does not

        plots.draw(results, ROOT / "docs" / "plots")
        tables.fill_documents(ROOT, results)
    show(results)


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
