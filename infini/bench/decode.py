"""Time for each token that is written, after short and long texts, beside plain attention of equal size. `infini bench decode`.

A fixed state costs the same after any text. Plain attention reads its whole cache for every token, until the cache no longer fits.
Both are first held against fp64, then timed: by one call a token, and with the step in a CUDA graph.
"""

import copy
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infini.bench.plain import PlainStep
from infini.config import InfiniConfig
from infini.errors import InputError
from infini.loading import load
from infini.model import InfiniTransformer
from infini.report.record import make_record, write_record
from infini.session import StreamingSession, fetch
from infini.testing import assert_witnessed
from infini.token_step import WARM_UP, TokenStep, wants_capture

SIZES = {
    "shipped": None,  # the weights that the library ships
    "1b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=16, segment_length=256),
}


def run(
    output: Path,
    sizes: Sequence[str] = ("shipped", "1b"),
    contexts: Sequence[int] = (4096, 1048576),
    plain_contexts: Sequence[int] = (4096, 32768, 131072, 1048576),
    paths: Sequence[str] = ("eager", "graph"),
    tokens: int = 256,
    repeats: int = 3,
    piece: int = 16384,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Verify, time, and write `output`/record.json, after every row.

    Args:
        output: a folder; made if it is missing.
        sizes: names of `SIZES`.
        contexts: tokens that the model with a memory reads before it writes; they are really read.
        plain_contexts: tokens in the cache of plain attention; random numbers, which cost the same.
        paths: `eager`, `graph`.
        tokens: written for one timing, writes of the memory among them.
        repeats: timings, of which the median counts.
        piece: tokens read at once.
        device: where to.
        dtype: of the weights.
        seed: of weights and texts.

    Returns:
        Rows: size, model (`infini` or `plain`), path, context, milliseconds for each token, tokens_per_second, state_bytes,
        peak_memory_bytes on a GPU; out_of_memory in place of times where the cache does not fit.

    Raises:
        InputError: an unknown size, or a graph where there can be none.
        AssertionError: a step does not agree with fp64; nothing is timed then.
    """
    if unknown := sorted(set(sizes) - set(SIZES)):
        raise InputError(f"sizes has {unknown}; choose of {', '.join(SIZES)}")
    started, device, rows, configs = time.time(), torch.device(device), [], {}
    for size in sizes:
        model = build(size, device, dtype, seed)
        plain = without_memory(model)
        for path in paths:
            wants_capture(path, model)
        verify(model, plain)
        configs[size] = model.config.to_dict() | {"parameters": sum(p.numel() for p in model.parameters())}
        timing = {"paths": paths, "tokens": tokens, "repeats": repeats}
        config = {"sizes": configs, "contexts": list(contexts), "plain_contexts": list(plain_contexts), "paths": list(paths)}
        config |= {"tokens": tokens, "repeats": repeats, "piece": piece, "device": str(device), "dtype": str(dtype)}
        for row in chain(infini_rows(model, contexts, piece, **timing), plain_rows(plain, plain_contexts, **timing)):
            rows.append(_printed({"size": size} | row))
            # After every row, so that one which is stopped loses nothing.
            record = make_record("decode", config=config, data={}, seeds={"weights": seed}, started=started, rows=rows)
            write_record(record, output / "record.json")
        del model, plain
    return rows


def build(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> InfiniTransformer:
    """A model of `SIZES`; random weights where none are shipped."""
    torch.manual_seed(seed)
    if SIZES[size] is None:
        return load(device=device, dtype=dtype)
    with device:
        return InfiniTransformer(InfiniConfig.long(**SIZES[size])).to(dtype).eval()


def without_memory(model: InfiniTransformer) -> InfiniTransformer:
    """Plain attention of the same shape and weights, as far as it has them; called as a model it sees two segments back."""
    config = model.config
    config = dataclasses.replace(config, memory_layers=(), local_attention="sliding", window=2 * config.segment_length)
    with torch.device("meta"):
        plain = type(model)(config, attention=model.attention_backend)
    own = plain.state_dict()
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in own}, assign=True)
    if config.tie_word_embeddings:
        plain.head.weight = plain.embedding.weight
    return plain.eval()


@torch.no_grad()
def verify(model: InfiniTransformer, plain: InfiniTransformer) -> None:
    """Both steps against the same weights in fp64, over a border between segments.

    Raises:
        AssertionError: one errs more than the model's ordinary call in the same dtype, by the rule of `infini.testing`.
    """
    device, dtype = model.embedding.weight.device, model.embedding.weight.dtype
    segment = model.config.segment_length
    read, beyond = segment - min(7, segment // 2), min(13, segment // 2)
    text = torch.randint(model.config.vocab_size, (1, segment + beyond), device=device)
    _, start = model(text[:, :read])
    step, state, found, ordinary = TokenStep(model, start, capture=device.type == "cuda"), start, [], []
    for token in text[0, read:]:
        found.append(step.step(token[None]).clone())
        logits, state = model(token[None, None], state)
        ordinary.append(logits[:, 0])
    exact = copy.deepcopy(model).double()(text)[0][:, read:]
    assert_witnessed("the step with a memory", torch.stack(found, 1), torch.stack(ordinary, 1), exact, dtype)
    cached = PlainStep(plain, text.shape[1])
    found = torch.stack([cached.step(text[:, i], i) for i in range(text.shape[1])], 1)
    ordinary, exact = plain(text)[0], copy.deepcopy(plain).double()(text)[0]
    assert_witnessed("the step of plain attention", found, ordinary, exact, dtype)


def infini_rows(
    model: InfiniTransformer, contexts: Sequence[int], piece: int, paths: Sequence[str], tokens: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Times of a session that has read `contexts` tokens."""
    device = model.embedding.weight.device
    for context in contexts:
        session = StreamingSession(model, piece=piece)
        # Text that is made as it is read: a million tokens take no memory.
        for start in range(0, context - 1, piece):
            session.feed(torch.randint(model.config.vocab_size, (min(piece, context - 1 - start),)))
        read = session.state
        for path in paths:

            def write(count: int, path: str = path, session: StreamingSession = session, read=read) -> Callable[[], object]:
                session.restart(read)
                session.feed([0])
                answer = session.generate(count, decode=path)  # captures
                return lambda: deque(answer, maxlen=0)

            yield {"model": "infini", "path": path, "context": context, "state_bytes": read.nbytes} | _timed(write, device, tokens, repeats)


def plain_rows(
    model: InfiniTransformer, contexts: Sequence[int], paths: Sequence[str], tokens: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Times of plain attention with `contexts` tokens in its cache, that of the new token among them."""
    device, config = model.embedding.weight.device, model.config
    for context in contexts:
        number = model.embedding.weight.element_size()
        needed = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * number * (context + tokens)
        row = {"model": "plain", "context": context, "state_bytes": needed}
        try:
            cached = PlainStep(model, context + tokens)
        except torch.OutOfMemoryError:
            yield row | {"path": None, "out_of_memory": True}
            continue
        for cache in cached.caches:
            cache.normal_()
        for path in paths:
            step = _fixed_place(cached, context - 1) if path == "graph" else None

            def write(count: int, step=step, cached: PlainStep = cached, context: int = context) -> Callable[[], None]:
                return lambda: _greedy(cached, step, context - 1, count)

            yield row | {"path": path} | _timed(write, device, tokens, repeats)
        del cached, step, write
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _fixed_place(cached: PlainStep, place: int) -> Callable[[Tensor], Tensor]:
    """The step at one place in a CUDA graph; the text does not grow by it, so its time is that of exactly this length."""
    device = cached.caches[0].device
    token = torch.zeros(cached.caches[0].shape[1], dtype=torch.long, device=device)
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            cached.step(token, place)
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = cached.step(token, place)

    def replay(chosen: Tensor) -> Tensor:
        token.copy_(chosen)
        graph.replay()
        return logits

    return replay


def _greedy(cached: PlainStep, fixed: Callable[[Tensor], Tensor] | None, place: int, count: int) -> None:
    """Write `count` tokens, each fetched as a session does."""
    chosen = torch.zeros(cached.caches[0].shape[1], dtype=torch.long, device=cached.caches[0].device)
    for i in range(count):
        arriving = fetch(chosen)
        logits = cached.step(chosen, place + i) if fixed is None else fixed(chosen)
        arriving()
        chosen = logits.argmax(dim=-1)


def _timed(write: Callable[[int], Callable[[], object]], device: torch.device, tokens: int, repeats: int) -> dict[str, Any]:
    """Milliseconds for each token; `write(count)` prepares, what it returns is timed."""
    write(min(8, tokens))()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(repeats):
        call = write(tokens)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - begun) / tokens)
    took = sorted(times)[len(times) // 2]
    row = {"milliseconds": took, "tokens_per_second": 1000 / took}
    if device.type == "cuda":
        row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return row


def _printed(row: dict[str, Any]) -> dict[str, Any]:
    speed = "out of memory" if row.get("out_of_memory") else f"{row['milliseconds']:9.3f} ms a token"
    state = f"{row['state_bytes'] / 2**20:12,.1f} MiB"
    print(f"{row['size']:8} {row['model']:6} {row['path'] or '-':6} {row['context']:>9,} tokens {state} {speed}", flush=True)
    return row
