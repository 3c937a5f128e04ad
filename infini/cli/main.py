"""`infini COMMAND ...`: finds the command, and turns errors into one sentence and an exit code."""

import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

from infini.errors import InputError

COMMANDS = {  # name -> what it does; infini.cli.NAME.run(arguments) is imported when it is asked for
    "passkey": "look for a pass key hidden in long texts, with any checkpoint",
    "perplexity": "how well a model predicts whole documents, by position, with and without its memory",
    "generate": "read a file of any size, then answer questions about it",
    "booksum": "what a model knows of whole books: summaries, wrong books, cloze questions",
    "summarize": "read a book of any size and print a summary",
    "capacity": "how many facts a memory holds, and how long",
    "speed": "how fast a model reads, writes and learns, by length",
    "drift": "the error of an fp32 memory after a long stream",
    "peak": "peak memory of a long prompt, through generate() and a session",
    "bench": "time the memory by kernels, or (bench decode) each token that is written",
    "tokenizer": "learn a byte-level BPE tokenizer from training texts",
    "train": "train a model (-m: a sweep over several)",
    "report": "render tables and pictures from the records of runs",
}
REMEDIES = {
    errno.ENOSPC: "free some space, or name an output folder on another disk",
    errno.EDQUOT: "free some space, or name an output folder on another disk",
    errno.EACCES: "name a file or folder that you may use",
    errno.EROFS: "name an output folder that can be written",
    errno.ENOENT: "name a folder that can be made",
    errno.ENOTDIR: "name a folder, not a file",
}
INTERRUPTED = 130  # as a shell reports a process that SIGINT ended
BROKEN_PIPE = 141  # and one that SIGPIPE ended


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        arguments: the command line without the program's name; None reads the process's own.

    Returns:
        0; 2 after input that cannot be used or a full disk; 130 after Ctrl-C or SIGTERM.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        if name in ("-h", "--help"):
            print(_help())
        elif name == "--version":
            print(metadata.version("infini-attention"))
        elif name not in COMMANDS:
            raise InputError(f"there is no command {name!r}: use one of {', '.join(COMMANDS)}")
        else:
            with _sigterm_as_ctrl_c():
                importlib.import_module(f"infini.cli.{name}").run(rest)
        sys.stdout.flush()
    except InputError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # Whoever reads the output has seen enough; at exit Python would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror}{where}: {REMEDIES[error.errno]}; what is finished is kept")
    except KeyboardInterrupt as stop:
        hint = str(stop) or "what is finished is kept, the same command goes on from there"
        print(f"\ninterrupted: {hint}", file=sys.stderr)
        return INTERRUPTED
    return 0


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM, with which schedulers stop a job, ends a command as Ctrl-C does; a command that knows better takes over inside."""
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _fail(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def _help() -> str:
    lines = [f"  {name:10} {what}" for name, what in COMMANDS.items()]
    usage = "usage: infini COMMAND [KEY=VALUE ...]"
    return "\n".join([usage, "", *lines, "", "infini COMMAND --help shows the keys of one."])


if __name__ == "__main__":
    sys.exit(main())
