"""The kernels compile for GPUs that are not here, and fit into what a program may have of their shared memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_all.py")
AMPERE, ADA, HOPPER = (("80", 163), ("89", 99), ("90", 227))  # KiB that one program may have
EVERY = [f"{dim}:{dtype}" for dim in (16, 32, 64, 96, 128, 256) for dtype in ("float32", "bfloat16", "float16")]


def of(gpu):
    return gpu[0], str(gpu[1] * 1024)


def compile_all(*arguments):
    # Another process, because the kernels of this one are interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("rows", ["", ":differ"], ids=["alike", "differ"])
def test_the_shipped_model_on_hopper(rows):
    done = compile_all(*of(HOPPER), f"128:bfloat16{rows}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_too_little_shared_memory_is_noticed():
    done = compile_all("90", "40000", "64:bfloat16")
    assert done.returncode == 1 and "read_backward" in done.stdout, done.stderr


@pytest.mark.slow  # minutes, once
@pytest.mark.parametrize("rows", ["", ":differ"], ids=["alike", "differ"])
@pytest.mark.parametrize("gpu", [AMPERE, ADA, HOPPER], ids=["ampere", "ada", "hopper"])
def test_every_width_and_dtype(gpu, rows):
    done = compile_all(*of(gpu), *(case + rows for case in EVERY))
    assert done.returncode == 0, done.stdout + done.stderr
