"""The record of one run: everything needed to trust a number, and to run it again."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from infini.errors import InputError

SCHEMA = 1
COMMIT_VARIABLE = "INFINI_COMMIT"  # names the commit where a copy of the tree travels without its history
COMMAND_VARIABLE = "INFINI_COMMAND"  # what was typed, for the processes that a sweep starts
CODE = ("infini", "baselines", "tasks", "conf", "pyproject.toml")
LIBRARIES = "infini-attention torch triton flash-attn einops numpy safetensors hydra-core transformers".split()


def make_record(
    kind: str,
    *,
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    seeds: Mapping[str, int],
    started: float,
    **results: Any,
) -> dict[str, Any]:
    """Joins a run's results with its provenance.

    Args:
        kind: what ran, "passkey" or "train"; `infini report` chooses the rendering by it.
        config: every setting of the run, resolved to plain values.
        data: what the run read: names, checksums.
        seeds: name -> seed.
        started: `time.time()` at the start, in seconds since the epoch.
        **results: what was measured; for tables `rows=[{...}, ...]`.

    Returns:
        A dict of JSON values with the keys schema, kind, command, source (commit, dirty), config, data, seeds, machine,
        versions, started (UTC, ISO 8601), seconds (wall time), then the results.

    Raises:
        InputError: a result has the name of a field of the provenance.

    >>> import time
    >>> record = make_record("passkey", config={}, data={}, seeds={"data": 1}, started=time.time(), rows=[])
    >>> record["schema"], record["kind"], record["seeds"], record["rows"]
    (1, 'passkey', {'data': 1}, [])
    """
    record = {
        "schema": SCHEMA,
        "kind": kind,
        "command": os.environ.get(COMMAND_VARIABLE) or typed_command(),
        "source": source(),
        "config": dict(config),
        "data": dict(data),
        "seeds": dict(seeds),
        "machine": machine(),
        "versions": versions(),
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 3),
    }
    if taken := sorted(record.keys() & results.keys()):
        raise InputError(f"a record already has the field {taken[0]!r}: give the result another name")
    return record | results


def checkout() -> Path | None:
    """The root of the source tree that this package runs from, or None when it was installed from a wheel."""
    root = Path(__file__).parents[2]
    return root if (root / "pyproject.toml").exists() else None


def source() -> dict[str, Any]:
    """The commit of the running code, and whether the code differs from it.

    Returns:
        {"commit", "dirty", "diff_sha256"}. Only what can change a number counts as dirty (CODE: edited, added or
        untracked files there), not texts or results; diff_sha256 is the hash of the difference or None. Where there is
        no commit to name (a wheel, no git) commit and dirty are None and "why" says so.
    """
    if stated := os.environ.get(COMMIT_VARIABLE):
        return {"commit": stated, "dirty": None, "diff_sha256": None, "why": f"stated by {COMMIT_VARIABLE}"}
    root = checkout()
    if root is None:
        return _without_commit("installed from a wheel")
    try:
        commit = _git(root, "rev-parse", "HEAD").decode().strip()
        changes = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *CODE)
        changes += _git(root, "diff", "HEAD", "--", *CODE)
    except FileNotFoundError:
        return _without_commit("git is not installed")
    except subprocess.CalledProcessError as error:
        return _without_commit(error.stderr.decode(errors="replace").partition("\n")[0] or "git failed")
    return {
        "commit": commit,
        "dirty": bool(changes),
        "diff_sha256": hashlib.sha256(changes).hexdigest() if changes else None,
    }


def machine() -> dict[str, Any]:
    """The hardware: processor, cores this process may use, memory in bytes, GPUs; no names of hosts or users."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append({"name": properties.name, "memory_bytes": properties.total_memory})
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
    }


def versions() -> dict[str, str]:
    """Python and the installed libraries that numbers depend on, by distribution name."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Writes a record as JSON so that `path` never holds half of one.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold.
        OSError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    write_atomically(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `path` whole or not at all: to a file beside it first, onto the disk, then renamed.

    Args:
        path: the file to write; missing folders are made.
        content: its bytes.

    Raises:
        OSError: the disk is full or the folder cannot be written; it names `path`, which is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner reads
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        error.filename = str(path)  # writing names no file, the rest names the temporary one
        raise


def read_record(path: Path) -> dict[str, Any]:
    """Reads a record and checks that this version understands it.

    Raises:
        InputError: there is no such file, it is not JSON, not a record, or of a newer schema.
    """
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"there is no record {path}: give a record.json or a folder that holds some") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): run the command that made it again") from None
    if not isinstance(record, dict) or not {"schema", "kind", "command"} <= record.keys():
        raise InputError(f"{path} is not a run record (no schema, kind and command): give a record.json")
    if record["schema"] != SCHEMA:
        raise InputError(f"{path} has record schema {record['schema']}, this version reads {SCHEMA}: update infini")
    return record


def typed_command() -> str:
    """The command line of this process, without the interpreter and the folder of the script."""
    # Hydra needs sys.argv without the sub-command, orig_argv keeps it.
    script, *arguments = sys.orig_argv[1:] or ["python"]
    return shlex.join([Path(script).name, *arguments])


def _without_commit(why: str) -> dict[str, Any]:
    return {"commit": None, "dirty": None, "diff_sha256": None, "why": why}


def _git(root: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True).stdout


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
