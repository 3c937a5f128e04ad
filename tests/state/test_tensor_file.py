"""The writer's real errors reach the caller as errors of the system, and the old file stays."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from infini.errors import InputError
from infini.tensor_file import write_tensors

# A limit on the size of files is a full disk that needs no rights and no mount: the system refuses to write on.
SCRIPT = """
import errno, resource, sys, torch
from pathlib import Path
from infini.errors import InputError
from infini.tensor_file import write_tensors

path = Path(sys.argv[1]) / "tensors"
write_tensors(path, {"a": torch.ones(4)})
old = path.read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_tensors(path, {"a": torch.ones(100_000)})
except OSError as error:
    assert (error.errno, error.filename) == (errno.EFBIG, str(path)), error
    assert path.read_bytes() == old and [p.name for p in path.parent.iterdir()] == ["tensors"]
    print("refused")
"""


def test_what_the_system_refuses_is_an_oserror_and_nothing_is_lost(tmp_path):
    found = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False)
    assert found.stdout == "refused\n", found.stderr


def test_what_is_no_error_of_the_system_stays_what_it_is(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise SafetensorError("InvalidTensorView")

    monkeypatch.setattr("infini.tensor_file.save_file", refuse)
    with pytest.raises(SafetensorError, match="InvalidTensorView"):
        write_tensors(tmp_path / "tensors", {"a": torch.ones(4)})


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for there in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(InputError, match="is no regular file, and saving would replace it"):
            write_tensors(there, {"a": torch.ones(1)})
    assert (tmp_path / "pipe").is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe"]
