import os
import signal
import subprocess
import sys

import pytest
import torch

from infini.data.batch import Batch
from infini.data.loader import load_batches


class Numbered:
    """Batch ``i`` holds the number i, the process that made it, and a draw of torch's generator."""

    def __getitem__(self, index):
        tokens = torch.tensor([[index, os.getpid()]])
        return Batch(tokens, torch.zeros(1, 2, dtype=torch.bool), segments=1)


class EndsWorkerOnSignal(Numbered):
    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


# Python 3.12 warns of every fork in a process with threads; torch has some.
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_from_start_to_stop(workers):
    batches = list(load_batches(Numbered(), 3, 13, workers=workers))
    assert [int(batch.tokens[0, 0]) for batch in batches] == list(range(3, 13))
    made_by = {int(batch.tokens[0, 1]) for batch in batches}
    assert len(made_by) == max(1, workers)
    assert (os.getpid() in made_by) == (workers == 0)


@forks
@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_random_state_alone(workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(load_batches(Numbered(), 0, 2, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@forks
def test_a_worker_outlives_the_signals_that_stop_the_run():
    batches = load_batches(EndsWorkerOnSignal(), 0, 3, workers=1)
    assert [int(batch.tokens[0, 0]) for batch in batches] == [0, 1, 2]


def test_the_tokenizer_is_there_without_torch():
    code = "import sys, infini.data; infini.data.__all__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
