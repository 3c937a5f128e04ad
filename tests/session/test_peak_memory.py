"""Peak memory of a stream does not grow with the text: measured, in a process of its own."""

import os
import subprocess
import sys

import pytest

MEASURE = """
import sys, torch
from infini import InfiniConfig, InfiniTransformer, StreamingSession

torch.set_num_threads(1)
shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, segment_length=256)
model = InfiniTransformer(InfiniConfig.long(**shape)).eval()

def peak(tokens):
    session, ids = StreamingSession(model, piece=1024), torch.arange(2048) % 256
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    for _ in range(tokens // 2048):
        session.feed(ids)
    status = open("/proc/self/status").read().split("VmHWM:")[1]
    return int(status.split()[0]), session.state_bytes

peak(16_384)
print(*peak(16_384), *peak(131_072))
"""


# glibc keeps freed blocks as it likes, some megabytes more or less; above this size they go back to the system at once, so
# that the peak is what is alive.
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def test_128k_tokens_need_no_more_than_16k():
    environment = os.environ | RETURNING
    command = [sys.executable, "-c", MEASURE]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    if "clear_refs" in found.stderr:
        pytest.skip("this system does not let a process reset its peak")
    assert found.returncode == 0, found.stderr
    short, short_state, long, long_state = map(int, found.stdout.split())
    assert long <= 1.02 * short, f"{long} KiB for 131072 tokens, {short} KiB for 16384"
    assert long_state == short_state
