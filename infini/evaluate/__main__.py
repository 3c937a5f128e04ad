"""`python -m infini.evaluate run --model infini ...`: lm-eval's command line, which then knows this library's model and tasks."""

import importlib.util
import sys
import tempfile
import time
from pathlib import Path

import infini.hf  # tasks such as RULER's ask transformers for the tokenizer of the checkpoint
from infini.errors import InputError
from infini.evaluate import InfiniLM  # registers the model


def main() -> int:
    """Runs lm-eval with the process's arguments; tasks are looked for in tasks/lm_eval unless --include_path is given.

    `--record FOLDER`, which lm-eval does not know, keeps the results as a record with its table in that folder.

    Returns:
        0; 2 after input that cannot be used.
    """
    from lm_eval.__main__ import cli_evaluate

    assert InfiniLM and infini.hf
    # Only a place to look for files: the library does not import its tasks.
    tasks = importlib.util.find_spec("infini.tasks.lm_eval")
    try:
        folder = _taken("--record")
        if "run" in sys.argv and "--include_path" not in sys.argv and tasks is not None:
            sys.argv += ["--include_path", tasks.submodule_search_locations[0]]
        if folder is None:
            cli_evaluate()
            return 0
        from infini.evaluate.kept import keep

        started = time.time()
        with tempfile.TemporaryDirectory() as scratch:
            sys.argv += ["--output_path", scratch]
            cli_evaluate()
            print("\n".join(map(str, keep(Path(scratch), Path(folder), started))))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _taken(option: str) -> str | None:
    """An option's value, taken out of the process's arguments; None if it is not there."""
    if option not in sys.argv:
        return None
    at = sys.argv.index(option)
    if at + 1 == len(sys.argv) or "--output_path" in sys.argv:
        raise InputError(f"{option} needs a folder, and stands in the place of --output_path")
    value = sys.argv[at + 1]
    del sys.argv[at : at + 2]
    return value


if __name__ == "__main__":
    sys.exit(main())
