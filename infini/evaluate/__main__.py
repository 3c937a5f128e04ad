"""`python -m infini.evaluate run --model infini ...`: lm-eval's command line, which then knows this library's model and tasks."""

import importlib.util
import sys

from infini.errors import InputError
from infini.evaluate import InfiniLM  # registers the model


def main() -> int:
    """Runs lm-eval with the process's arguments; tasks are looked for in tasks/lm_eval unless --include_path is given.

    Returns:
        0; 2 after input that cannot be used.
    """
    from lm_eval.__main__ import cli_evaluate

    assert InfiniLM
    # Only a place to look for files: the library does not import its tasks.
    tasks = importlib.util.find_spec("infini.tasks.lm_eval")
    if "run" in sys.argv and "--include_path" not in sys.argv and tasks is not None:
        sys.argv += ["--include_path", tasks.submodule_search_locations[0]]
    try:
        cli_evaluate()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
