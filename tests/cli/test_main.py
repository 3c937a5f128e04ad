"""The console command: exit codes, what it prints, what it leaves behind."""

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from infini.cli import main as cli
from infini.config import InfiniConfig
from infini.train.reach import write_reach

COMMAND = [sys.executable, "-m", "infini.cli.main"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    import torch

    from infini.model import InfiniTransformer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    InfiniTransformer(InfiniConfig(**shape, segment_length=64)).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def log_level_stays():
    logger = logging.getLogger("infini")
    level = logger.level
    yield
    logger.setLevel(level)


def run(*arguments, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*COMMAND, *arguments], cwd=folder, capture_output=True, text=True, env=environment)


def test_help_is_quick_and_imports_nothing_heavy(tmp_path):
    heavy = ("torch", "hydra", "numpy", "matplotlib", "transformers")
    code = f"import sys, infini.cli.main as m; m.main(['--help']); assert not set({heavy}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        result = run("--help", folder=tmp_path)
        seconds.append(time.perf_counter() - started)
        assert result.returncode == 0
        assert all(name in result.stdout for name in cli.COMMANDS)
    assert min(seconds) < 1


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_each_command_needs_no_torch(command, tmp_path):
    code = f"import sys, infini.cli.main as m; sys.exit(m.main(['{command}', '--help']) or 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    keys = {"passkey": "haystack", "generate": "prompt_file", "train": "learning_rate", "report": "PATH"}
    keys |= {"capacity": "distances", "drift": "probe", "bench": "repeats", "perplexity": "knockout", "tokenizer": "vocab_size", "peak": "warm_up"}
    keys |= {"speed": "train_lengths", "booksum": "wrong_books", "summarize": "session"}
    assert keys[command] in result.stdout
    assert not list(tmp_path.iterdir())


def test_passkey_writes_record_table_and_picture(checkpoint, tmp_path, monkeypatch, capfd):
    write_reach(checkpoint, 96, 1096)
    asked = (f"checkpoint={checkpoint}", "lengths=[320,512]", "depths=[0,1]", "samples=2", "batch_size=2", "output=out")
    result = run("passkey", *asked, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    record = json.loads((out / "record.json").read_text())
    assert [(row["length"], row["depth"]) for row in record["rows"]] == [(320, 0), (320, 1), (512, 0), (512, 1)]
    needed = {"length", "depth", "samples", "exact_match", "digit_accuracy", "tokens_per_second", "peak_memory_bytes"}
    assert all(needed <= row.keys() and row["samples"] == 2 for row in record["rows"])
    assert record["config"]["lengths"] == [320, 512]
    assert len(record["data"]["checkpoint_sha256"]) == 64
    assert record["data"]["trained"] == {"gradient_tokens": 96, "text_tokens": 1096}
    assert "- trained: gradient through at most 96 tokens, states of texts of up to 1,096\n" in (out / "record.md").read_text()
    assert (out / "record.md").read_text() in result.stdout
    assert (out / "record.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # Hydra left no folder of its own

    before = (out / "record.json").read_bytes()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["passkey", *asked]) == 0
    assert (out / "record.json").read_bytes() == before  # nothing was measured again

    capfd.readouterr()
    assert cli.main(["passkey", *asked, "seed=1"]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "holds another run: its seed is 0, here it is 1" in captured.err
    assert (out / "record.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bench", "device=cpu"], "device is 'cpu', which is cpu here: the kernels are timed on a CUDA GPU only"),
        (["bench", "repeats=0"], "repeats is 0; it must be at least 1"),
        (["pass"], f"there is no command 'pass': use one of {', '.join(cli.COMMANDS)}"),
        (["passkey", "checkpoint=nowhere"], "there is no checkpoint folder 'nowhere'"),
        (["passkey", "depths=[1.5]"], "depth is 1.5"),
        (["passkey", "device=tpu"], "device is 'tpu': use auto, cpu, cuda or cuda:N"),
        (["report", "nowhere"], "there is no record nowhere"),
    ],
    ids=str,
)
def test_bad_input_exits_with_2_and_one_sentence(arguments, sentence, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert sentence in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.clip=0", "clip is 0.0 but must be greater than 0"),
        ("train.stepz=1", "nothing reads train.stepz; did you mean train.steps?"),
    ],
)
def test_bad_input_of_train_too(override, sentence, tmp_path):  # a process of its own: Hydra sets up logging
    result = run("train", "debug=tiny", override, folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"error: {sentence}"
    assert "Traceback" not in result.stderr


def test_a_length_too_short_for_its_prompt(checkpoint, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["passkey", f"checkpoint={checkpoint}", "lengths=[30]"]) == 2
    assert "length is 30 tokens" in capfd.readouterr().err


def test_a_full_disk_is_said_and_other_system_errors_are_not_hidden(monkeypatch, capsys):
    def fail(number):
        def run(arguments):
            raise OSError(number, os.strerror(number), "out/record.json")

        return run

    monkeypatch.setattr("infini.cli.report.run", fail(errno.ENOSPC))
    assert cli.main(["report", "x"]) == 2
    assert "No space left on device (out/record.json): free some space" in capsys.readouterr().err
    monkeypatch.setattr("infini.cli.report.run", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        cli.main(["report", "x"])


def test_train_goes_on_and_a_sweep_runs_only_what_is_missing(tmp_path):
    sweep = ("train", "-m", "debug=tiny", "train.steps=1", "output=runs/sweep")
    first = run(*sweep, "seed=1", folder=tmp_path)
    assert first.returncode == 0, first.stderr
    (record,) = tmp_path.glob("runs/sweep/*/record.json")
    assert record.parent.name == "debug-tiny+seed-1+train.steps-1"
    before = record.read_bytes()

    both = run(*sweep, "seed=1,2", folder=tmp_path)
    assert both.returncode == 0, both.stderr
    assert record.read_bytes() == before
    seeds = [json.loads(path.read_text())["seeds"]["train"] for path in tmp_path.glob("runs/sweep/*/record.json")]
    assert sorted(seeds) == [1, 2]
    assert json.loads(before)["command"].endswith("train -m debug=tiny train.steps=1 output=runs/sweep seed=1")


def test_a_failed_job_is_named_and_the_others_still_run(tmp_path):
    result = run("train", "-m", "debug=tiny", "train.steps=1", "train.clip=0,1", "output=runs", folder=tmp_path)
    assert result.returncode == 2
    assert re.search(r"train.clip-0\S* failed: clip is 0.0 but must be greater than 0", result.stdout + result.stderr)
    assert len(list(tmp_path.glob("runs/*/record.json"))) == 1


def test_ctrl_c_keeps_the_checkpoint_and_says_how_to_go_on(tmp_path):
    command = [*COMMAND, "train", "debug=tiny", "output=run", "train.steps=100000"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted: " in errors and "run the same command again to go on" in errors
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["train.learning_rate=1e30", "train.clip=1e30"], "a number measured after step 1 is not finite"),
        (["train.learning_rate=1e3", "train.clip=1e30", "train.knockout_every=1000", "train.checkpoint_every=1000"], "became (nan|inf) in step"),
    ],
    ids=["probe", "step"],
)
def test_a_training_that_diverges_ends_though_it_has_workers(changes, told, tmp_path):
    result = subprocess.run(
        [*COMMAND, "train", "debug=tiny", "output=run", "train.steps=1000", "train.warmup_steps=1", "train.workers=1", *changes],
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2 and re.search(f"error: .*{told}.*lower learning_rate", result.stderr), result.stderr
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_a_passkey_run_that_a_scheduler_stops_says_so_and_keeps_its_cells(checkpoint, tmp_path):
    command = [*COMMAND, "passkey", f"checkpoint={checkpoint}", "lengths=[320,100000000]", "depths=[0]", "device=cpu", "output=out"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/cells/320-*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.endswith("\ninterrupted: what is finished is kept, the same command goes on from there\n") and "Traceback" not in errors
    assert out == "" and list(tmp_path.glob("out/cells/320-*.json"))


def test_sigterm_is_left_as_it_was(monkeypatch):
    seen = []
    monkeypatch.setattr("infini.cli.report.run", lambda arguments: seen.append(signal.getsignal(signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    try:
        for handler in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(signal.SIGTERM, handler)
            assert cli.main(["report"]) == 0
            assert signal.getsignal(signal.SIGTERM) == handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.default_int_handler, signal.SIG_IGN]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
@pytest.mark.parametrize("asked", ["--help", "--version"])
def test_a_full_disk_under_the_output_is_said(asked):
    with open("/dev/full", "w") as full:
        result = subprocess.run([*COMMAND, asked], stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: No space left on device: free some space") and "Traceback" not in result.stderr


def test_output_that_nobody_reads_on_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    for asked in (["passkey", "--help"], ["--help"]):
        result = subprocess.run([*COMMAND, *asked], stdout=writer, stderr=subprocess.PIPE, text=True)
        assert (result.returncode, result.stderr) == (141, "")
    os.close(writer)
