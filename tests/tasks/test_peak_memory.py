import pytest
import torch
from infini.tasks import peak_memory
from infini.tasks.peak_memory import peak_bytes, start_peak

from infini.errors import InputError

CPU, MIB = torch.device("cpu"), 2**20


def test_a_new_peak_forgets_the_old_one_and_sees_what_was_freed_again():
    start_peak(CPU)
    resident = peak_bytes(CPU)
    torch.ones(32 * MIB)  # 128 MiB, gone at once
    assert 120 * MIB < peak_bytes(CPU) - resident < 160 * MIB
    start_peak(CPU)
    assert abs(peak_bytes(CPU) - resident) < 20 * MIB


def test_a_system_that_cannot_measure_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, "Path", lambda name: tmp_path / "missing" / name[1:])
    with pytest.raises(InputError, match="cannot reset.*Linux or on a GPU"):
        start_peak(CPU)
