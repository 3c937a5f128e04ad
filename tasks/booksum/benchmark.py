"""Does a model know the books that it has read? What ``infini booksum`` runs."""

from __future__ import annotations

import inspect
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from infini.tasks.booksum.cloze import Question, make_questions
from infini.tasks.booksum.likelihood import Silenced, choice_scores, target_nll
from infini.tasks.booksum.measures import lead, score_summary
from infini.tasks.booksum.pairs import Pair, PairFiles, digest, read_pairs
from infini.tasks.booksum.prompt import END, SUMMARY_PROMPT, ask_summary
from infini.tasks.booksum.rouge import require_rouge
from infini.tasks.booksum.training import encode_books
from infini.tasks.peak_memory import peak_bytes, start_peak
from tqdm import tqdm

from infini.data.tokenizer import load_tokenizer
from infini.errors import InputError
from infini.report.fingerprint import fingerprint
from infini.session import StreamingSession

MEMORY, SILENCED, FIRST, LEAD = "whole model", "memory silenced", "first segment only", "first sentences"
_CHECK = 16  # tokens after which it is looked whether every summary has ended


@dataclass(frozen=True, kw_only=True)
class BooksumSettings(PairFiles):
    """What is asked; `pairs`, `books`, `key`, `text`, `summary`, `root` as in :class:`infini.tasks.booksum.pairs.PairFiles`.

    Attributes:
        lengths: tokens from the beginning of a book after which everything is asked, beside the whole book.
        knockout: everything a second time with the memory silenced.
        questions: most cloze questions for each book and length.
        wrong_books: other books after which a summary is scored too.
        outputs: write summaries.
        samples: summaries sampled for each book, beside a greedy one.
        temperature, top_p, max_new_tokens: of sampling; arXiv 2404.07143 has 0.5, 0.95 and 1,024.
        decode: as of :meth:`infini.session.StreamingSession.generate`; a model whose memory is silenced has no captured step.
        summary_tokens: most tokens of a reference whose likelihood is taken.
        batch_size: books read side by side; each is a wrong book for others of its batch.
        question_batch: questions asked side by side.
        piece: tokens of each book at once.
        seed: of questions and samples.
    """

    lengths: tuple[int, ...] = (16384, 32768, 65536, 131072, 262144, 524288)
    knockout: bool = True
    questions: int = 400
    wrong_books: int = 3
    outputs: bool = True
    samples: int = 1
    temperature: float = 0.5
    top_p: float = 0.95
    max_new_tokens: int = 1024
    decode: Literal["eager", "graph", "auto"] = "eager"
    summary_tokens: int = 1024
    batch_size: int = 8
    question_batch: int = 32
    piece: int = 4096
    seed: int = 0

    def __post_init__(self):
        for name in ("wrong_books", "max_new_tokens", "summary_tokens", "question_batch", "piece"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("questions", "samples", "seed"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.batch_size < 2:
            raise InputError(f"batch_size is {self.batch_size}; it must be at least 2: a book is the wrong one for another of its batch")
        if any(length < 1 for length in self.lengths) or sorted(set(self.lengths)) != list(self.lengths):
            raise InputError(f"lengths are {list(self.lengths)}; they must grow and be at least 1")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise InputError(f"temperature is {self.temperature} and top_p {self.top_p}; above 0, and top_p at most 1")


@dataclass
class _Shelf:
    """What is known of the books of a batch, by their name, before a model reads them."""

    books: dict[str, np.ndarray]
    pairs: dict[str, list[Pair]]
    settings: BooksumSettings
    tokenizer: Any
    _questions: dict[tuple[str, int], tuple[list[Question], float]] = field(default_factory=dict)

    def questions(self, book: str, tokens: int) -> tuple[list[Question], float]:
        """Questions about the first tokens of a book, and how many tokens a letter of it has."""
        if (book, tokens) not in self._questions:
            ids = self.books[book][:tokens]
            text = self.pairs[book][0].text if tokens >= len(self.books[book]) else self.tokenizer.decode(ids.tolist())
            made = make_questions(text, self.settings.seed, self.settings.questions)
            self._questions[book, tokens] = made, len(ids) / max(1, len(text))
        return self._questions[book, tokens]


def run(model, settings: BooksumSettings) -> tuple[list[dict], dict[str, Any]]:
    """Read every book once, and at each length ask everything of the state there.

    Args:
        model: of the protocol, in evaluation mode; its configuration names its tokenizer.
        settings: see :class:`BooksumSettings`.

    Returns:
        A row for each pair, variant (the model, its memory silenced, its first segment only, the book's first sentences) and length:
        pair, book, variant, length (tokens asked for; None: the whole book), input_tokens, reference, summary_tokens, nll and
        nll_wrong (nats of the right summary after the right book, and the mean after wrong ones; None without a model), outputs
        (decoding, seed, text, scores of :func:`infini.tasks.booksum.measures.score_summary`), cloze (of each distance: from
        (letters), and :func:`summed_choices`), beyond (the same of questions farther away than local attention reaches), state_bytes,
        seconds (of reading up to here, for the whole batch), peak_memory_bytes. And what identifies the data: checksums, pairs left out.

    Raises:
        InputError: pairs that cannot be read, a book shorter than a segment, fewer than two books, rouge-score missing.
    """
    require_rouge()
    tokenizer = load_tokenizer(model.config)
    pairs, skipped = read_pairs(settings)
    books, segment = encode_books(pairs, tokenizer, model.config.segment_length), model.config.segment_length
    if len(books) < 2:
        raise InputError(f"{next(iter(books))!r} is the only book; a summary is scored after a wrong book too: give two or more")
    by_book: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_book[pair.book].append(pair)
    data = {"checkpoint_sha256": fingerprint(model), "pairs_sha256": digest(pairs), "pairs_read": len(pairs), "books": len(books)}
    if tokenizer.fingerprint is not None:
        data["tokenizer_sha256"] = tokenizer.fingerprint
    if skipped:
        data["skipped"] = skipped
    shelf = _Shelf(books, by_book, settings, tokenizer)
    readers = [(MEMORY, model)]
    if settings.knockout and "memory" in inspect.signature(model.forward).parameters:
        readers.append((SILENCED, Silenced(model)))
    batches = _batches(books, settings.batch_size)
    rows = []
    total = len(readers) * sum(len(books[name]) for batch in batches for name in batch)
    with tqdm(total=total, unit="tok", unit_scale=True, desc="reading", disable=None) as bar:
        for variant, reader in readers:
            for batch in batches:
                rows += _read(reader, variant, batch, shelf, segment, bar)
    rows += [_lead_row(pair, settings.summary_tokens, tokenizer) for pair in pairs]
    order = {pair.name: i for i, pair in enumerate(pairs)}
    return sorted(rows, key=lambda row: order[row["pair"]]), data


def _batches(books: dict[str, np.ndarray], size: int) -> list[list[str]]:
    """Books of about one length side by side; none alone."""
    names = sorted(books, key=lambda name: (-len(books[name]), name))
    found = [names[i : i + size] for i in range(0, len(names), size)]
    if len(found) > 1 and len(found[-1]) == 1:
        found[-2:] = [found[-2] + found[-1]]
    return found


def _read(reader, variant: str, names: list[str], shelf: _Shelf, segment: int, bar: tqdm) -> list[dict]:
    settings, device = shelf.settings, next(reader.parameters()).device
    sizes = [len(shelf.books[name]) for name in names]
    session, rows, done, seconds = StreamingSession(reader, len(names), piece=settings.piece), [], 0, 0.0
    first = {segment} if variant == MEMORY else set()
    start_peak(device)
    for stop in sorted({length for length in (*settings.lengths, *first) if length < max(sizes)} | {max(sizes)}):
        begun = time.perf_counter()
        for start in range(done, stop, settings.piece):
            ids = np.zeros((len(names), min(settings.piece, stop - start)), np.int64)
            padding = np.ones(ids.shape, bool)
            for row, name in enumerate(names):
                part = shelf.books[name][start : start + ids.shape[1]]
                ids[row, : len(part)], padding[row, : len(part)] = part, False
            session.feed(torch.from_numpy(ids), torch.from_numpy(padding) if padding.any() else None)
            bar.set_postfix_str(f"memory {peak_bytes(device) / 2**20:,.0f} MiB", refresh=False)
            bar.update(int((~padding).sum()))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds, done = seconds + time.perf_counter() - begun, stop
        state = session.state
        own = {"state_bytes": state.nbytes // len(names), "seconds": seconds, "peak_memory_bytes": peak_bytes(device)}
        cells = []
        if stop in first:
            cells.append((FIRST, stop, [i for i, size in enumerate(sizes) if size > stop], False))
        if stop in settings.lengths:
            cells.append((variant, stop, [i for i, size in enumerate(sizes) if size > stop], True))
        if stop == max(sizes):
            cells.append((variant, None, list(range(len(names))), True))
        for called, length, active, cloze in cells:
            if active:
                found = _ask(reader, state, names, active, shelf, length, cloze)
                rows += [{**row, "variant": called, "length": length, **own} for row in found]
    return rows


def _ask(reader, state, names: list[str], active: list[int], shelf: _Shelf, length: int | None, cloze: bool) -> list[dict]:
    """Everything that is asked of the states of some books; the other books of the batch are wrong ones too."""
    settings, tokenizer = shelf.settings, shelf.tokenizer
    asked, source, of = [], [], []
    for i in active:
        others = [(i + step) % len(names) for step in range(1, min(settings.wrong_books, len(names) - 1) + 1)]
        for pair in shelf.pairs[names[i]]:
            for j in (i, *others):
                asked.append(ask_summary(tokenizer, pair.summary, settings.summary_tokens))
                source.append(j)
                of.append((pair, j == i))
    nll = target_nll(reader, state.select(torch.tensor(source)), asked, settings.batch_size)
    right, wrong = {}, defaultdict(list)
    for (pair, is_right), value in zip(of, nll, strict=True):
        if is_right:
            right[pair.name] = value
        else:
            wrong[pair.name].append(value)
    written = _write(reader, state.select(torch.tensor(active)), settings, tokenizer) if settings.outputs else [[] for _ in active]
    rows = []
    for i, outputs in zip(active, written, strict=True):
        size = len(shelf.books[names[i]])
        tokens = size if length is None else min(size, length)
        answers = _cloze(reader, state.select(torch.tensor([i])), shelf, names[i], tokens) if cloze else {"cloze": [], "beyond": None}
        for pair in shelf.pairs[names[i]]:
            scored = [{**output, **score_summary(output["text"], pair.summary, pair.text)} for output in outputs]
            target = ask_summary(tokenizer, pair.summary, settings.summary_tokens).target
            rows.append(
                {
                    "pair": pair.name, "book": pair.book, "input_tokens": tokens, "reference": pair.summary, "summary_tokens": len(target),
                    "nll": right[pair.name], "nll_wrong": float(np.mean(wrong[pair.name])), "outputs": scored, **answers,
                }  # fmt: skip
            )
            answers = {"cloze": [], "beyond": None}  # they are of the book, whatever the number of its summaries
    return rows


def _write(reader, state, settings: BooksumSettings, tokenizer) -> list[list[dict]]:
    """Summaries of every row: a greedy one, then the sampled ones."""
    device, count = next(reader.parameters()).device, state.batch_size
    prompt = torch.from_numpy(tokenizer.encode_bytes(SUMMARY_PROMPT.encode()).astype(np.int64)).repeat(count, 1)
    found: list[list[dict]] = [[] for _ in range(count)]
    session = StreamingSession(reader, state=state, piece=settings.piece)
    decode = "eager" if isinstance(reader, Silenced) else settings.decode
    for sample in range(settings.samples + 1):
        decoding, seed = ("greedy", None) if sample == 0 else ("sampled", settings.seed + sample - 1)
        choice = {} if sample == 0 else {"temperature": settings.temperature, "top_p": settings.top_p}
        generator = torch.Generator(device).manual_seed(seed or 0)
        session.restart(state)
        session.feed(prompt)
        steps: list[torch.Tensor] = []
        for token in session.generate(settings.max_new_tokens, generator=generator, decode=decode, **choice):
            steps.append(token)
            if len(steps) % _CHECK == 0 and all(END in tokenizer.decode(ids) for ids in torch.stack(steps, dim=1).tolist()):
                break
        for own, ids in zip(found, torch.stack(steps, dim=1).tolist(), strict=True):
            text, end, _ = tokenizer.decode(ids).partition(END)
            own.append({"decoding": decoding, "seed": seed, "text": text.strip(), "ended": bool(end)})
    return found


def _cloze(reader, state, shelf: _Shelf, book: str, tokens: int) -> dict[str, Any]:
    questions, per_letter = shelf.questions(book, tokens)
    scores = choice_scores(reader, state, shelf.tokenizer, questions, shelf.settings.question_batch, shelf.settings.piece)
    # Layer by layer, attention to the segment before reaches one segment farther.
    reach = reader.config.segment_length * (reader.config.num_hidden_layers + 1)
    bins: dict[int, list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        bins[question.bin].append(i)
    pairs = {question.pair for question in questions if question.distance * per_letter <= reach}
    beyond = [i for i, question in enumerate(questions) if question.pair not in pairs]
    return {
        "cloze": [{"from": 2**b, **summed_choices(questions, scores, bins[b])} for b in sorted(bins)],
        "beyond": {"tokens": reach, **summed_choices(questions, scores, beyond)},
    }


def summed_choices(questions: Sequence[Question], scores: np.ndarray, which: Sequence[int]) -> dict[str, float | int]:
    """Questions taken together: how many, how many right, how many of their pairs the right way round, and the sum of the margins.

    The margin of a question is the log-likelihood of its answer less that of the other choice. In the sum over a pair, what a
    model has for or against a name by itself falls out; a pair is the right way round where that sum is above 0. What is equal counts
    as half right.

    Args:
        questions: all.
        scores: fp64 ``[questions, 2]``, nats.
        which: indices of those that count, whole pairs.

    Example:
        A model that always prefers Ann, but somewhat less where Bob is right, knows something:

        >>> from infini.tasks.booksum.cloze import Question
        >>> one, other = (Question("____ went.", name, ("Ann", "Bob"), "who", 0, 0) for name in ("Ann", "Bob"))
        >>> summed_choices([one, other], np.array([[-1.0, -5.0], [-1.0, -4.0]]), [0, 1])
        {'questions': 2, 'right': 1.0, 'turned': 1.0, 'margin': 1.0}
    """
    right, margins = 0.0, defaultdict(float)
    for i in which:
        place = questions[i].choices.index(questions[i].answer)
        margin = float(scores[i, place] - scores[i, 1 - place])
        right += _above(margin)
        margins[questions[i].pair] += margin
    turned = float(sum(map(_above, margins.values())))
    return {"questions": len(which), "right": right, "turned": turned, "margin": float(sum(margins.values()))}


def _above(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def _lead_row(pair: Pair, most: int, tokenizer) -> dict:
    text = lead(pair.text, len(pair.summary.split()))
    empty = {"nll": None, "nll_wrong": None, "cloze": [], "beyond": None, "state_bytes": None, "seconds": None, "peak_memory_bytes": None}
    return {
        "pair": pair.name, "book": pair.book, "variant": LEAD, "length": None, "input_tokens": len(tokenizer.encode_bytes(text.encode())),
        "reference": pair.summary, "summary_tokens": len(ask_summary(tokenizer, pair.summary, most).target),
        "outputs": [{"decoding": "greedy", "seed": None, "text": text, "ended": True, **score_summary(text, pair.summary, pair.text)}],
        **empty,
    }  # fmt: skip
