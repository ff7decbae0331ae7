"""Copies between devices, and why GPUs may be missing; no GPU is needed to see that they say so."""

import threading
from typing import Any

import numpy as np
import pytest

from parallel_keras import hardware
from parallel_keras.explaining import self_check
from parallel_keras.explaining.self_check import Fault, check_copies
from parallel_keras.hardware import Card, why_no_gpus

CARDS = [Card(0, "NVIDIA T4", 15360), Card(1, "NVIDIA A100", 40960)]


def test_real_copies_are_right() -> None:
    """F1: https://github.com/tensorflow/tensorflow/issues/44976."""
    assert check_copies([f"/device:CPU:{index}" for index in range(4)], count=1000) == []


def test_each_pair_is_checked_both_ways_with_other_numbers() -> None:
    seen = []

    def copy(numbers: Any, source: str, target: str) -> Any:
        seen.append((source, target, float(numbers[0])))
        return numbers

    check_copies(["A", "B", "C"], copy=copy, count=3)
    pairs = [pair[:2] for pair in seen]
    assert pairs == [("A", "B"), ("A", "C"), ("B", "A"), ("B", "C"), ("C", "A"), ("C", "B")]
    assert len({pair[2] for pair in seen}) == 6


def corrupt(numbers: Any) -> Any:
    numbers[7] += 1
    return numbers


def fail(numbers: Any) -> Any:
    raise RuntimeError("peer access\nis not supported")


CASES = {
    "corrupt": (corrupt, "corrupt", "1 of 100 numbers arrived changed"),
    "stale": (np.zeros_like, "corrupt", "100 of 100 numbers arrived changed"),
    "cut off": (lambda numbers: numbers[:50], "corrupt", "(50,) arrived of (100,)"),
    "hangs": (lambda numbers: threading.Event().wait(60), "hangs", "nothing arrived within 2 s"),
    "fails": (fail, "fails", "RuntimeError: peer access is not supported"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_pair_is_named(case: str) -> None:
    """F1: https://github.com/tensorflow/tensorflow/issues/44976.

    Only one direction of one pair is bad, and the pairs after it are checked all the same.
    """
    copy_badly, kind, detail = CASES[case]

    def copy(numbers: Any, source: str, target: str) -> Any:
        return copy_badly(numbers) if (source, target) == ("GPU:1", "GPU:0") else numbers

    faults = check_copies(["GPU:0", "GPU:1", "CPU:0"], copy=copy, timeout=2.0, count=100)
    assert faults == [Fault("GPU:1", "GPU:0", kind, detail)]


def test_a_device_that_does_not_exist_fails() -> None:
    [there, back] = check_copies(["/device:CPU:0", "/device:CPU:99"], count=10)
    assert (there.kind, back.kind) == ("fails", "fails")
    assert "RuntimeError: Expected the numbers on /device:CPU:99, but" in there.detail


def test_why_gpus_are_missing() -> None:
    assert why_no_gpus(2, CARDS, {}, built=True) == []
    assert why_no_gpus(1, [], {}, built=True) == []  # ROCm: nvidia-smi lists none
    [reason] = why_no_gpus(0, CARDS, {"CUDA_VISIBLE_DEVICES": ""}, built=True)
    assert reason.startswith("CUDA_VISIBLE_DEVICES='' hides GPUs: unset it")
    [reason] = why_no_gpus(1, CARDS, {"CUDA_VISIBLE_DEVICES": "0"}, built=True)
    assert "CUDA_VISIBLE_DEVICES='0' hides GPUs" in reason
    [reason] = why_no_gpus(0, CARDS, {}, built=False)
    assert "built for CPUs only" in reason
    [reason] = why_no_gpus(0, [], {}, built=True)
    assert "The driver lists no NVIDIA GPU" in reason
    [reason] = why_no_gpus(0, CARDS, {"CUDA_VISIBLE_DEVICES": "0,1"}, built=True)
    assert reason.startswith("The driver lists 2, TensorFlow sees 0: it did not find its CUDA")


def test_the_drivers_list_is_read() -> None:
    listing = "0, NVIDIA T4, 15360\n1, NVIDIA A100, 40960\n2, broken, [N/A]\n\n"
    assert hardware.parse_cards(listing) == CARDS


def test_without_a_driver_there_are_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    assert hardware.driver_cards() == []
    monkeypatch.setattr(hardware.shutil, "which", lambda name: "/bin/false")
    assert hardware.driver_cards() == []
    monkeypatch.setattr(hardware.shutil, "which", lambda name: "/does/not/exist")
    assert hardware.driver_cards() == []


def test_host_memory_is_plausible() -> None:
    memory = hardware.host_memory()
    assert memory is None or 100 < memory < 10**8


def test_numbers_come_from_the_source() -> None:
    numbers = np.arange(5, dtype=np.float32)
    np.testing.assert_array_equal(
        self_check.copy_between(numbers, "/device:CPU:1", "/device:CPU:2"), numbers
    )
