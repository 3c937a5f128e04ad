"""A long prompt through `.generate()` takes memory for its ids and masks, and for nothing else that grows."""

import os
import subprocess
import sys

import pytest
import torch

CODE = """
import torch, transformers, infini.hf
from pathlib import Path
from infini.hf import InfiniForCausalLM, InfiniHFConfig

torch.set_num_threads(1)
shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, segment_length=64)
model = InfiniForCausalLM(InfiniHFConfig(vocab_size=4096, **shape)).eval()
model.piece = 256

def peak(tokens):
    ids = torch.randint(4096, (1, tokens))
    Path("/proc/self/clear_refs").write_text("5")
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

peak(1024)
short, long = peak(4096), peak(4096 + 32768)
print((long - short) / 32768)
"""


def test_memory_grows_by_ids_and_masks_alone():
    # All logits would be 16,384 bytes a token, a cache of keys and values 256, kept hidden states 128.
    # The allocator gives freed blocks back at once, so that the peak is what is alive.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False, env=environment)
    if "clear_refs" in result.stderr:
        pytest.skip("this system does not let a process reset its peak")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= 64


@torch.no_grad()
def test_no_pass_is_longer_than_a_piece_and_one_column_gets_logits(make):
    model, seen, logits = make(), [], []
    model.piece = 16
    model.model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    model.model.head.register_forward_hook(lambda module, args, output: logits.append(output.shape[1]))
    model.generate(torch.randint(256, (2, 1000)), max_new_tokens=3, do_sample=False)
    assert seen == [16] * 62 + [8, 1, 1]
    assert logits == [1, 1, 1]
