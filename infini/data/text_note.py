"""What a saved session has read: a note beside it, so that it never answers for another text or another model."""

import json
import os
from pathlib import Path
from typing import BinaryIO

from infini.errors import InputError


def note_of(session: str | os.PathLike) -> Path:
    """Where the note on a saved session is.

    >>> note_of("read.st").name
    'read.st.text.json'
    """
    return Path(f"{os.fspath(session)}.text.json")


def write_note(session: str | os.PathLike, read: int, tokens: int, digest, weights: str) -> None:
    """Write the note, after the session itself: where the disk is full, the older session and its note are whole.

    Args:
        session: file of the saved session.
        read: bytes of the text that it has read.
        tokens: its `tokens_seen`, which tells a note of an older save.
        digest: `hashlib.sha256` of these bytes.
        weights: `infini.report.fingerprint.fingerprint` of the model that read them.

    Raises:
        OSError: the disk is full; an older note is as it was.
    """
    fields = {"bytes": read, "tokens": tokens, "text_sha256": digest.hexdigest(), "weights_sha256": weights}
    note = note_of(session)
    part = note.with_name(note.name + ".part")
    part.write_text(json.dumps(fields) + "\n")
    os.replace(part, note)


def pass_over(session: str | os.PathLike, file: BinaryIO, digest, tokens: int, weights: str) -> int:
    """Move `file` behind what a saved session has read, which must be the same text, read by the same weights.

    Args:
        session, tokens, weights: as of `write_note`.
        file: the text, open at its start.
        digest: a new `hashlib.sha256`; has the bytes passed over afterwards.

    Returns:
        How many bytes that is.

    Raises:
        InputError: the note is missing, damaged or of another save, or the text or the weights are others.
    """
    note = note_of(session)
    try:
        saved = json.loads(note.read_text())
        done, text, model = saved["bytes"], saved["text_sha256"], saved["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{note} cannot be read ({error}); it belongs to the saved session: name another session file") from None
    if saved.get("tokens", tokens) != tokens:
        raise InputError(f"{note} is of an older save than {session}; name another session file")
    if model != weights:
        raise InputError(f"{session} was read by a model with other weights; name another session file")
    left = done
    while left and (part := file.read(min(left, 2**20))):
        digest.update(part)
        left -= len(part)
    if digest.hexdigest() != text:
        raise InputError(f"{session} has read another text than {file.name}; name another session file")
    return done
