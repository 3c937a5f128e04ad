"""The one door to lm-eval. `import infini.evaluate` registers the model "infini" there; `python -m infini.evaluate` is its command line.

Without lm-eval the import works and registers nothing; a name of it then says what to install.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from infini.errors import InputError

if TYPE_CHECKING:
    from infini.evaluate.lm import InfiniLM as InfiniLM

_HOMES = {"InfiniLM": "lm"}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'infini.evaluate' has no attribute {name!r}")
    if not _has_lm_eval():
        raise InputError(f"infini.evaluate.{name} needs lm-eval; install it with: pip install 'infini-attention[eval]'")
    return getattr(importlib.import_module(f"infini.evaluate.{_HOMES[name]}"), name)


def _has_lm_eval() -> bool:
    try:
        return importlib.util.find_spec("lm_eval") is not None
    except ValueError:  # sys.modules["lm_eval"] is None: switched off
        return False


if _has_lm_eval():
    importlib.import_module("infini.evaluate.lm")
