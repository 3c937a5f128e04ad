"""The shipped record was made with exactly these bytes, and the shipped model (its answers did not hold the stop after them)."""

import hashlib

import pytest
import torch
from infini.tasks.passkey import benchmark
from infini.tasks.passkey.benchmark import PasskeyBenchmark, run
from infini.tasks.passkey.training import PasskeyTraining
from infini.tasks.recall.training import RecallTraining


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def test_the_default_benchmark_reads_the_same_bytes(oracle, tokenizer, tmp_path, monkeypatch):
    asked, fed, build, read = [], [], benchmark.build_prompt, benchmark._seconds_to_read
    monkeypatch.setattr(benchmark, "build_prompt", lambda *given: asked.append(build(*given)) or asked[-1])
    monkeypatch.setattr(benchmark, "_seconds_to_read", lambda session, ids, bar: fed.append(ids) or read(session, ids, bar))
    run(oracle(), tokenizer, PasskeyBenchmark(lengths=(4096,), depths=(0.25, 1.0), samples=2), tmp_path)
    assert [(prompt.key, prompt.needle_start) for prompt in asked] == [
        (46057, 1112),
        (72977, 1112),
        (41950, 3999),
        (22543, 3999),
    ]
    assert sha256(torch.cat(fed)) == "6f11b4a671a04def"


@pytest.mark.parametrize(
    ("source", "digests"),
    [
        (
            PasskeyTraining(steps=1000, seed=0),
            [
                ("e7f2cff61072e531", "afaf5f39bd5b1c32"),
                ("f409312b7e97c5cd", "fb80ce1aa9f94a5c"),
                ("82b0e45672364528", "37246a34c93de0f0"),
            ],
        ),
        (
            PasskeyTraining(steps=1000, seed=3, recall_share_end=0.0, recall_fall=0.1),
            [
                ("348242ef9555e1f2", "634bae24e3c29b40"),
                ("1fe2b48a1a94d417", "0d8a147040e6e1e0"),
                ("67fcb129d51afcab", "6bc2c1d313dadb53"),
            ],
        ),
        (
            RecallTraining(steps=1000, seed=0, max_segments=8),
            [
                ("4d668746d70729ac", "e94f0325f7d95e58"),
                ("5f3623efabe6eedf", "2edc399d013d1b39"),
                ("332b01220f9a9ed0", "4287b71bfe3d1316"),
            ],
        ),
    ],
    ids=["mixture", "passkey", "recall"],
)
def test_training_reads_the_same_bytes(source, digests):
    batches = [source[step] for step in (0, 400, 999)]
    assert [(sha256(batch.tokens), sha256(batch.answer)) for batch in batches] == digests
