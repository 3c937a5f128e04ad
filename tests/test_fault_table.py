"""The table of faults in tests/README.md names tests that exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_named_test_exists():
    table = (HERE / "README.md").read_text()
    defined = {name for path in HERE.rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    defined |= {path.stem for path in HERE.rglob("test_*.py")}
    named = set(re.findall(r"\btest_\w+", table))
    assert len(named) > 30
    assert named <= defined, f"not there: {sorted(named - defined)}"
