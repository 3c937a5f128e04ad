"""Run tests against sabotaged copies of the library: one process that has imported torch, one fork per copy.

Reads a JSON job list on stdin and writes, for each job, which of its tests turned red. Not a test itself:
`test_sabotage.py` starts it in a process of its own, so that no copy of the library meets another.
"""

import gc
import json
import os
import shutil
import sys
import time
from pathlib import Path

# Imported here so that the forks need not.
import einops  # noqa: F401
import numpy  # noqa: F401
import pytest
import safetensors.torch  # noqa: F401
import torch._dynamo
import torch.utils.checkpoint  # noqa: F401

WORKERS = 2


class Recorder:
    """Notes the test functions that turn red, and skips the other parameters of those that have."""

    def __init__(self):
        self.red = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item, nextitem):
        return item.nodeid.split("[")[0] in self.red or None

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.red.add(report.nodeid.split("[")[0])


def copy_of(root: Path, tree: Path, edits: list[list[str]]) -> str | None:
    """Copy the library and apply the edits; the sentence that says why not, if one does not apply."""
    shutil.copytree(root / "infini", tree / "infini", ignore=shutil.ignore_patterns("weights", "__pycache__"))
    for file, old, new in edits:
        path = tree / file
        source = path.read_text()
        if old not in source:
            return f"{file} has no {old!r} any more; adapt the sabotage to the new source"
        path.write_text(source.replace(old, new))
    return None


def child(root: Path, tree: Path, tests: list[str]) -> None:
    """Run `tests` against the copy, in this process, and leave the outcome in a file."""
    with open(tree / "output.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(root)
    # The tests named here need no plugin, and loading those that are installed takes longer than most of them.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(tree))
    import infini

    recorder, code, begun = Recorder(), None, time.monotonic()
    if Path(infini.__file__).is_relative_to(tree):
        # Nobody reads why a test is red: assertions need not be rewritten to say so.
        options = ["-q", "--tb=line", "--assert=plain", "-p", "no:cacheprovider", "-c", str(root / "pyproject.toml"), f"--rootdir={root}"]
        code = int(pytest.main([*options, *tests], plugins=[recorder]))
    outcome = {"red": sorted(recorder.red), "code": code, "seconds": time.monotonic() - begun}
    (tree / "outcome.json").write_text(json.dumps(outcome))


def main() -> None:
    request = json.load(sys.stdin)
    root, work = Path(request["root"]), Path(request["work"])
    outcomes, running = {}, {}

    def collect() -> None:
        pid, _ = os.wait()
        name = running.pop(pid)
        found = work / name / "outcome.json"
        if found.exists():
            outcomes[name] = json.loads(found.read_text())
        else:
            outcomes[name] = {"error": (work / name / "output.txt").read_text()[-2000:]}

    gc.freeze()  # what is imported by now is no garbage: no fork needs to look through it
    for name, edits, tests in request["jobs"]:
        if why := copy_of(root, work / name, edits):
            outcomes[name] = {"error": why}
            continue
        if len(running) == WORKERS:
            collect()
        pid = os.fork()
        if pid == 0:
            try:
                child(root, work / name, tests)
            finally:
                os._exit(0)
        running[pid] = name
    while running:
        collect()
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
