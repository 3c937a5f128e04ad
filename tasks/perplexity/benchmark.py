"""Perplexity of a model on documents: what ``infini perplexity`` runs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from infini.tasks.peak_memory import peak_bytes, start_peak
from infini.tasks.perplexity.score import score_documents, tokens_of_buckets
from tqdm import tqdm

from infini.data.tokenized import TokenizedDocuments, tokenize
from infini.data.tokenizer import load_tokenizer
from infini.errors import InputError
from infini.report.fingerprint import fingerprint

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings:
    """What is asked.

    Attributes:
        texts: files, see :func:`infini.data.documents.read_documents`.
        column: of tables.
        knockout: score everything a second time with the memory silenced.
        batch_size: documents at once.
        piece: tokens of a document at once.
    """

    texts: tuple[str, ...]
    column: str = "text"
    knockout: bool = True
    batch_size: int = 4
    piece: int = 4096

    def __post_init__(self):
        for name in ("batch_size", "piece"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")


def run(model, settings: PerplexitySettings) -> tuple[list[dict], dict[str, Any]]:
    """Score every document: all its tokens but the first, each once, given all before it. Documents of about one length share a batch.

    Args:
        model: of the protocol, in evaluation mode; its configuration names its tokenizer.
        settings: see :class:`PerplexitySettings`.

    Returns:
        A row for each document, in the order of the files: document (its name), tokens (predicted ones: all but the first),
        words (pieces between blanks), bytes (UTF-8), nll and nll_without_memory (nats; None without a memory or without
        ``knockout``), carried_numbers and carried_bytes (what crosses its last segment border, see
        :class:`infini.protocol.Carried`), state_bytes (all that is held at its end, the open segment too), by_position (for each
        power of two: from, tokens, nll, nll_without_memory). And what identifies the data: checksums, rows left out.

    Raises:
        InputError: texts that cannot be read, a document of fewer than 2 tokens, documents that are all too short for a memory.
    """
    tokenizer = load_tokenizer(model.config)
    text = tokenize(settings.texts, tokenizer, settings.column)
    if len(short := [name for name, size in zip(text.names, text.sizes, strict=True) if size < 2]):
        raise InputError(f"document {short[0]} has fewer than 2 tokens; nothing of it can be predicted: leave it out")
    knockout = settings.knockout and has_memory(model)
    segment = model.config.segment_length
    if knockout and int(text.sizes.max()) - 1 <= segment:  # the last token is predicted, not read
        raise InputError(
            f"the longest document has {int(text.sizes.max())} tokens and a segment {segment}: no memory would ever be read; "
            "give longer documents, or knockout=false"
        )
    data = {"checkpoint_sha256": fingerprint(model), "tokens_sha256": text.digest()}
    if tokenizer.fingerprint is not None:
        data["tokenizer_sha256"] = tokenizer.fingerprint
    if text.skipped:
        data["skipped"] = text.skipped
    rows: dict[int, dict] = {}
    longest_first = sorted(range(len(text)), key=lambda i: -text.sizes[i])
    device = next(model.parameters()).device
    start_peak(device)
    total = (1 + knockout) * int(text.sizes.sum() - len(text))
    with tqdm(total=total, unit="tok", unit_scale=True, desc="scoring", disable=None) as bar:

        def progress(tokens: int) -> None:
            bar.set_postfix_str(f"memory {peak_bytes(device) / MIB:,.0f} MiB", refresh=False)
            bar.update(tokens)

        for start in range(0, len(text), settings.batch_size):
            group = longest_first[start : start + settings.batch_size]
            documents = [text[i] for i in group]
            found = score_documents(model, documents, settings.piece, progress=progress)
            silent: list = [None] * len(group)
            if knockout:
                silent = score_documents(model, documents, settings.piece, memory=False, progress=progress)
            for i, one, other in zip(group, found, silent, strict=True):
                rows[i] = _row(model, text, i, one, other)
    return [rows[i] for i in range(len(text))], data


def has_memory(model) -> bool:
    """Whether the model knows what it is to be without its memory."""
    return "memory" in inspect.signature(model.forward).parameters


def _row(model, text: TokenizedDocuments, i: int, nll: list[float], silent: list[float] | None) -> dict:
    size, segment = int(text.sizes[i]), model.config.segment_length
    carried = model.carried((size - 1) // segment * segment)
    buckets = [
        {"from": 2**b, "tokens": tokens, "nll": nll[b], "nll_without_memory": None if silent is None else silent[b]}
        for b, tokens in enumerate(tokens_of_buckets(size))
    ]
    return {
        "document": text.names[i],
        "tokens": size - 1,
        "words": text.words[i],
        "bytes": text.bytes[i],
        "nll": sum(nll),
        "nll_without_memory": None if silent is None else sum(silent),
        "carried_numbers": carried.numbers,
        "carried_bytes": carried.bytes,
        "state_bytes": model.state_bytes(size - 1),
        "by_position": buckets,
    }
