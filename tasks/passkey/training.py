"""Training batches for the passkey: passkey rows among rows of dense recall."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from infini.tasks.passkey.keys import draw_keys
from infini.tasks.passkey.needles import NEEDLES, Decoy, NeedleKind, Quiz, needle_kind
from infini.tasks.passkey.row import Asked, Row, Script
from infini.tasks.recall.training import RecallTraining
from infini.tasks.rows import RowSource, run_of

from infini.data.batch import Batch, Gap
from infini.errors import InputError

_PASSKEY = NEEDLES["passkey"]
_GAPS = 1  # the stream of randomness that gaps are drawn from


@dataclass(frozen=True, kw_only=True)
class PasskeyTraining(RowSource):
    """Rows of the passkey benchmark's own text, and rows of dense recall to learn retrieval from.

    The signal of one passkey in a long text is too thin to teach retrieval from scratch: the share
    of recall rows falls linearly from ``recall_share_start`` to ``recall_share_end`` over the first
    ``recall_fall`` of training, and ``dense_question_share`` of the passkey rows ask
    every half to two segments after the needle, where there are several keys for any of those said by then.

    A passkey row is a benchmark prompt, its answer and a little more filler. The key's depth is
    uniform. The last prompt ends within the row's last segment; in ``border_share`` of the rows it
    ends exactly on a segment border, where the benchmark's round lengths put it (its answer is then
    written into a new segment). Keys of the benchmark never occur.

    Long gap: in ``gap_share`` of the batches after ``gap_after`` of training all rows are passkey rows
    with the needle before one segment border and all questions after it, and at that border stand
    ``k`` segments of the rows' own filler, ``k`` log-uniform. The other batches are those of a run
    without gaps.

    Attributes:
        recall_share_start: share of recall rows at the first step.
        recall_share_end: share of recall rows from ``recall_fall`` on.
        recall_fall: share of training over which the one becomes the other.
        dense_question_share: share of passkey rows with the question repeated.
        near_share: share of passkey rows with less than a segment between needle and last question, where
            local attention has to copy the digits; a uniform depth hardly ever asks for that.
        first_share: share of passkey rows with the needle in the first segment's worth of filler, with a long gap too;
            it is written with hardly anything in the memory, which a uniform depth seldom asks for.
        border_share: share of passkey rows whose last prompt ends on a segment border.
        recall_pools: see :class:`RecallTraining`.
        recall_longest_gaps: see :class:`RecallTraining`.
        needle_shares: share of passkey rows with a needle of another kind, by its name; the rest are
            passkeys, and so is a row that is too short for its kind.
        gap_share: share of batches with a long gap.
        gap_after: share of training before the first gap.
        gap_growth: share of training, from there on, over which the longest gap grows geometrically
            from 1 segment to ``max_gap_segments``.
        max_gap_segments: the longest gap.
        gap_tokens_per_batch: upper limit of ``rows * k * n`` where one row fits: a long gap has few rows.

    Example:
        >>> source = PasskeyTraining(steps=100, recall_share_start=0.0, recall_share_end=0.0)
        >>> batch = source[0]
        >>> text = bytes(batch.tokens[0].tolist()).decode()
        >>> start = text.index("The pass key is ") + 16
        >>> asked = bytes(batch.tokens[0][batch.answer[0]].tolist()).decode()
        >>> asked.rstrip(".")[-5:] == text[start : start + 5]
        True
    """

    recall_share_start: float = 1.0
    recall_share_end: float = 0.2
    recall_fall: float = 0.5
    dense_question_share: float = 0.5
    near_share: float = 0.1
    first_share: float = 0.0
    border_share: float = 0.25
    recall_pools: tuple[int, ...] = (1, 2, 4, 8, 16)
    recall_longest_gaps: tuple[int, ...] = (0, 32, 128, 512)
    needle_shares: Mapping[str, float] = field(default_factory=dict)
    gap_share: float = 0.0
    gap_after: float = 1 / 3
    gap_growth: float = 1 / 3
    max_gap_segments: int = 1024
    gap_tokens_per_batch: int = 2**20

    def __post_init__(self):
        super().__post_init__()
        for name in (
            "recall_share_start",
            "recall_share_end",
            "recall_fall",
            "dense_question_share",
            "near_share",
            "first_share",
            "border_share",
            "gap_share",
            "gap_after",
            "gap_growth",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1")
        for name in ("max_gap_segments", "gap_tokens_per_batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        self._check_needles()
        script = Script(self._tokenizer)
        object.__setattr__(self, "_script", script)
        shortest = self.min_segments * self.segment_length
        needed = script.fixed_size(_SHORTEST) + len(script.answer(_SHORTEST_KEY)) - 1
        if shortest < needed:
            raise InputError(
                f"min_segments {self.min_segments} of segment_length {self.segment_length} are "
                f"{shortest} tokens, but a passkey row takes {needed}; "
                "raise min_segments"
            )
        if self.gap_share > 0 and self.max_segments < sum(self._around_gap()):
            raise InputError(
                f"max_segments is {self.max_segments}, but with a gap a passkey row takes "
                f"{sum(self._around_gap())} segments of {self.segment_length}; raise max_segments"
            )
        # Built once: it checks its own settings, and write_row calls it for most rows.
        recall = RecallTraining(
            steps=self.steps, pools=self.recall_pools, longest_gaps=self.recall_longest_gaps, tokenizer=self.tokenizer
        )
        object.__setattr__(self, "_recall", recall)
        fillers = {name: script.ids(kind.filler) for name, kind in NEEDLES.items()}
        object.__setattr__(self, "_fillers", fillers)

    def _check_needles(self) -> None:
        for name, share in self.needle_shares.items():
            if not needle_kind(name).trained:
                raise InputError(f"needle {name} is for measurement only; leave it out of needle_shares")
            if share < 0:
                raise InputError(f"the needle share of {name} is {share}; it must not be negative")
        if sum(self.needle_shares.values()) > 1 + 1e-9:
            raise InputError(
                f"needle_shares are {dict(self.needle_shares)}, more than 1 in all; "
                "they are shares of the passkey rows"
            )

    def recall_share(self, progress: float) -> float:
        """The share of recall rows when ``progress`` (0..1) of training is done."""
        fallen = 1.0 if self.recall_fall == 0 else min(1.0, progress / self.recall_fall)
        return self.recall_share_start + fallen * (self.recall_share_end - self.recall_share_start)

    def longest_gap(self, progress: float) -> int:
        """The most segments that a gap can have when ``progress`` (0..1) of training is done."""
        after = progress - self.gap_after
        grown = 1.0 if self.gap_growth == 0 else min(1.0, max(0.0, after) / self.gap_growth)
        return round(self.max_gap_segments**grown)

    def __getitem__(self, step: int) -> Batch:
        # Drawn apart, so that the batches without a gap are those of a run without gaps.
        random, progress = self.random(step, _GAPS), step / self.steps
        if progress < self.gap_after or random.random() >= self.gap_share:
            return super().__getitem__(step)
        return self._gap_batch(random, step)

    def write_row(self, random, progress, tokens, answer) -> None:
        if random.random() < self.recall_share(progress):
            self._recall.write_recall(random, tokens, answer, self.draw_filler(random, self._recall.filler))
        else:
            self._write_passkey(random, tokens, answer)

    def _write_passkey(self, random, tokens, answer) -> None:
        name, key, quiz = self._draw_quiz(random)
        script, fixed = self._script, self._script.fixed_size(quiz)
        if len(tokens) < fixed + len(script.answer(key)):
            name, key, quiz = "passkey", *_draw(random, _PASSKEY)
            fixed = script.fixed_size(quiz)
        prompt = self._prompt_length(random, len(tokens), fixed, len(script.answer(key)))
        filler = prompt - fixed
        row, last = self._start_row(random, tokens, answer, name), script.asked(quiz.question, key)

        before = self._filler_before(random, filler)
        if random.random() < self.near_share:
            before = filler - int(random.integers(min(filler, self.segment_length), endpoint=True))
        asked = self._dense_questions(random, filler - before, script.asked_size(quiz, key))
        filler -= len(asked) * script.asked_size(quiz, key)
        row.say(script.head(quiz))
        said = [(decoy.offset(before, filler), decoy) for decoy in quiz.decoys]
        decoys = [(place, script.statement(decoy.text)) for place, decoy in said]
        questions = self._questions(random, [before + place for place in asked], last, said, filler)
        filler -= sum(len(one.ids) - len(last.ids) for _, one in questions)
        row.stretch(filler, [*decoys, (before, script.statement(quiz.needle)), *questions])
        row.ask(last)
        row.fill(len(tokens) - row.at)

    def _gap_batch(self, random, step: int) -> Batch:
        n, (head, tail) = self.segment_length, self._around_gap()
        low = max(self.min_segments, head + tail)
        segments = int(random.integers(low, max(low, self.top(step)), endpoint=True))
        position = int(random.integers(head, segments - tail, endpoint=True))
        # Floor of a log-uniform number below longest + 1.
        gap = int((self.longest_gap(step / self.steps) + 1) ** random.random())

        rows = max(1, min(self.tokens_per_batch // (segments * n), self.gap_tokens_per_batch // (gap * n)))
        tokens = np.empty((rows, segments * n + 1), self._tokenizer.dtype)
        answer = np.zeros(tokens.shape, bool)
        fillers = [
            self._write_around_gap(random, tokens[row], answer[row], position * n, gap * n)
            for row in range(rows)
        ]
        # One period for all rows: their own where it is the same, else the whole gap.
        periods = {len(filler) for filler, _ in fillers}
        period = min(gap * n, *periods) if len(periods) == 1 else gap * n
        gap_filler = np.stack([run_of(filler, phase, period) for filler, phase in fillers])
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(answer),
            segments,
            Gap(position, gap, torch.from_numpy(gap_filler)),
        )

    def _write_around_gap(
        self, random, tokens, answer, border: int, gap: int
    ) -> tuple[np.ndarray, int]:
        """Writes a row with its needle before token ``border`` and its questions after it.

        Returns:
            The row's filler, and where in it the gap of ``gap`` tokens begins.
        """
        name, key, quiz = self._draw_quiz(random)
        script, share = self._script, border / len(tokens)
        sizes = script.sizes_around(quiz, share)
        if border < sizes[0] or len(tokens) - border < sizes[1] + len(script.answer(key)):
            name, key, quiz = "passkey", *_draw(random, _PASSKEY)
            sizes = script.sizes_around(quiz, share)
        prompt = self._prompt_length(random, len(tokens), border + sizes[1], len(script.answer(key)))
        row, last = self._start_row(random, tokens, answer, name), script.asked(quiz.question, key)

        filler = border - sizes[0]
        before = self._filler_before(random, filler)
        decoys = [
            (decoy.offset(before, filler) if decoy.before else round(decoy.place / share * filler), text)
            for decoy, text in script.decoys(quiz, share, after=False)
        ]
        row.say(script.head(quiz))
        row.stretch(filler, [*decoys, (before, script.statement(quiz.needle))])

        phase = row.phase
        row.phase += gap
        filler = prompt - border - sizes[1]
        asked = self._dense_questions(random, filler, script.asked_size(quiz, key))
        filler -= len(asked) * script.asked_size(quiz, key)
        later = [
            (round((decoy.place - share) / (1 - share) * filler), decoy, text)
            for decoy, text in script.decoys(quiz, share, after=True)
        ]
        said = [(0, decoy) for decoy, _ in script.decoys(quiz, share, after=False)]
        said += [(place, decoy) for place, decoy, _ in later]
        questions = self._questions(random, asked, last, said, filler)
        filler -= sum(len(one.ids) - len(last.ids) for _, one in questions)
        row.stretch(filler, [*((place, text) for place, _, text in later), *questions])
        row.ask(last)
        row.fill(len(tokens) - row.at)
        return row.filler, phase

    def _around_gap(self) -> tuple[int, int]:
        """The fewest segments before and after a gap that hold a passkey and its question."""
        before, after = self._script.sizes_around(_SHORTEST, 1.0)
        # One more token than segments: the last one is predicted and never read.
        needed = before, after + len(self._script.answer(_SHORTEST_KEY)) - 1
        return tuple(-(-size // self.segment_length) for size in needed)

    def _draw_quiz(self, random) -> tuple[str, int, Quiz]:
        name = "passkey"
        # Without other kinds nothing is drawn, so that rows are what they were before there were any.
        if any(self.needle_shares.values()):
            left = random.random()
            for other, share in self.needle_shares.items():
                if 0 <= left < share:
                    name = other
                left -= share
        return name, *_draw(random, NEEDLES[name])

    def _start_row(self, random, tokens, answer, name) -> Row:
        filler = self.draw_filler(random, self._fillers[name])
        return Row(tokens, answer, self._script.after, filler, phase=int(random.integers(len(filler))))

    def _questions(
        self, random, places: list[int], last: Asked, said: list[tuple[int, Decoy]], filler: int
    ) -> list[tuple[int, Asked]]:
        """What is asked at each of the places: what the row ends with, or what any decoy answers that was said by then.

        The same question again could be answered with the answer before. One that is longer is asked as long as it takes
        only filler from behind the last event.
        """
        others = [
            (place, self._script.asked(decoy.question, decoy.key)) for place, decoy in said if decoy.question is not None
        ]
        spare = filler - max([place for place, _ in said] + places, default=0)
        questions = []
        for place in places:
            known = [last] + [
                asked for since, asked in others if since <= place and len(asked.ids) - len(last.ids) <= spare
            ]
            questions.append((place, known[random.integers(len(known))] if len(known) > 1 else last))
            spare -= len(questions[-1][1].ids) - len(last.ids)
        return questions

    def _filler_before(self, random, filler: int) -> int:
        """Tokens of filler before the needle."""
        # Without a share nothing is drawn for it, so that rows are what they were before there was one.
        if self.first_share and random.random() < self.first_share:
            filler = min(filler, self.segment_length)
        return int(random.integers(filler, endpoint=True))

    def _dense_questions(self, random, left: int, size: int) -> list[int]:
        """Places, in tokens of filler, of the questions before the last one."""
        places, place = [], 0
        if random.random() < self.dense_question_share:
            half = self.segment_length // 2
            while (gap := int(random.integers(half, 4 * half, endpoint=True))) + size < left:
                place += gap
                places.append(place)
                left -= gap + size
        return places

    def _prompt_length(self, random, row_length: int, shortest: int, answer: int) -> int:
        """Where the last question ends: in the last segment, the answer's digits still inside."""
        border = row_length - 1 - self.segment_length
        if border >= shortest and random.random() < self.border_share:
            return border
        return int(random.integers(max(border, shortest), row_length - answer, endpoint=True))


def _draw(random, kind: NeedleKind) -> tuple[int, Quiz]:
    key = int(draw_keys(random, 1, kind.digits, held_out=False)[0])
    return key, kind.draw(random, key, False)


_SHORTEST_KEY = 10 ** (_PASSKEY.digits - 1)
_SHORTEST = _PASSKEY.draw(np.random.default_rng(0), _SHORTEST_KEY, False)
