"""Every choice of a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from infini.errors import InputError
from infini.field_types import check_types

# These decide how a run is carried out or watched, not what it computes:
# a run may be resumed with other values.
_CONVENIENCE = frozenset(
    {"device", "log_every", "checkpoint_every", "knockout_every", "workers", "tensorboard", "loss_tokens"}
)


@dataclass(frozen=True)
class TrainSettings:
    """Settings of :func:`infini.train.train`; a value out of range raises ``InputError``.

    Attributes:
        steps: optimizer steps.
        learning_rate: peak rate of matrices, norms and embeddings.
        memory_learning_rate_scale: the memory's own parameters (gate logits, write gates, scales)
            learn this many times faster, because a gate at the common rate may hardly leave its start.
        weight_decay: AdamW decay of the matrices; nothing else decays.
        betas: AdamW moment decays.
        warmup_steps: steps of linear warm-up; the cosine spans the rest.
        min_learning_rate_ratio: the cosine ends at this share of the peak.
        clip: largest norm of the whole gradient.
        token_weight: of the mean loss over all tokens. Natural text has far more loss than answers do, and drowns them at weight 1.
        answer_weight: of the mean loss over answers, beside it; 0: a plain language model, to which an answer is a token like others.
        accumulation: batches per optimizer step, weighted as if they were one.
        precision: "bf16" (autocast around the model; parameters and state stay fp32) or "fp32".
        recompute: recompute the activations of each block in the backward pass.
        replay_segments: hold the activations of so many segments at a time, for one more forward pass, see
            :class:`infini.train.replay.Replay`; the gradient stays exact. None: of whole rows.
        replay_checkpoints: "every" keeps a state for each group of ``replay_segments``, "sqrt" for some
            ``2 sqrt(groups)``, for one more forward pass.
        bptt_segments: truncate: the gradient stops at every so-many-th segment border of a row. A multiple of
            ``replay_segments`` where that is set; alone, rows are read and learned from in pieces of this size. None: never.
        gap_read_segments: most segments of a long gap that are read; a longer one is stretched from its last, exact for
            filler that repeats as far as it does not depend on what it reads of the memory; in ``delta`` an estimate, and not
            for ``gamma_delta``, see :func:`infini.train.stretch.stretch`. None: read in full.
        gap_gradient_segments: most segments of a long gap, its last, that have gradient: so the model learns to write little of
            filler, and not only to read in spite of it. Their activations are held too. For ``linear``, and not with
            ``replay_segments`` or ``bptt_segments``, see :mod:`infini.train.long_gap`. None: none of them.
        loss_tokens: tokens whose logits exist at a time while the loss is computed; the same numbers for any. None: as many as
            make 256 MiB of them.
        compile: compile what the model's blocks do before and after attention, see :meth:`infini.decoder.Decoder.enable_compile`. The
            first step waits for it, and in a later one the first batch of a single row; the log says so. Results
            differ by rounding.
        seed: Python, NumPy and torch random states at the start.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        log_every: steps between lines of metrics; the host waits for the device only then.
        checkpoint_every: steps between checkpoints; one is also written at the end.
        knockout_every: steps between telemetry lines (gates, memory share, knock-out).
        validate_every: steps between readings of held-out text; the best weights are kept, see :class:`infini.train.held_out.HeldOut`.
            None: never.
        patience: end training after so many readings without a better one; the learning rate is then what its schedule of
            ``steps`` says there. None: never.
        workers: processes that make batches.
        tensorboard: also write TensorBoard events.

    Example:
        >>> TrainSettings(steps=10, warmup_steps=2).learning_rate
        0.001
        >>> TrainSettings(steps=10)
        Traceback (most recent call last):
        ...
        infini.errors.InputError: warmup_steps is 100 but steps is 10: warm up for fewer steps
    """

    steps: int
    learning_rate: float = 1e-3
    memory_learning_rate_scale: float = 5.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 100
    min_learning_rate_ratio: float = 0.1
    clip: float = 1.0
    token_weight: float = 1.0
    answer_weight: float = 1.0
    accumulation: int = 1
    precision: str = "bf16"
    recompute: bool = False
    replay_segments: int | None = None
    replay_checkpoints: str = "every"
    bptt_segments: int | None = None
    gap_read_segments: int | None = None
    gap_gradient_segments: int | None = None
    loss_tokens: int | None = None
    compile: bool = False
    seed: int = 0
    device: str = "auto"
    log_every: int = 20
    checkpoint_every: int = 500
    knockout_every: int = 200
    validate_every: int | None = None
    patience: int | None = None
    workers: int = 2
    tensorboard: bool = False

    def __post_init__(self):
        check_types(self)
        object.__setattr__(self, "betas", tuple(self.betas))  # YAML has lists only
        at_least_one = ("steps", "accumulation", "log_every", "checkpoint_every", "knockout_every")
        for name in at_least_one:
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("learning_rate", "memory_learning_rate_scale"):
            _require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "greater than 0, and finite")
        _require(self.clip > 0, "clip", self.clip, "greater than 0")  # infinity clips nothing
        for name in ("token_weight", "answer_weight", "weight_decay"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more, and finite")
        for name in ("warmup_steps", "workers", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        if self.token_weight == self.answer_weight == 0:
            raise InputError("token_weight and answer_weight are both 0: nothing would be learned; raise one")
        ratio = self.min_learning_rate_ratio
        _require(0 <= ratio <= 1, "min_learning_rate_ratio", ratio, "between 0 and 1")
        two_decays = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(two_decays, "betas", self.betas, "two numbers of at least 0 and below 1")
        _require(self.precision in ("bf16", "fp32"), "precision", self.precision, "bf16 or fp32")
        for name in ("validate_every", "patience"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1, or null")
        if self.patience and not self.validate_every:
            raise InputError(f"patience is {self.patience}, but validate_every is null: nothing says whether training still helps")
        self._check_replay()
        if self.warmup_steps > self.steps:
            raise InputError(
                f"warmup_steps is {self.warmup_steps} but steps is {self.steps}: "
                "warm up for fewer steps"
            )

    def _check_replay(self) -> None:
        for name in ("replay_segments", "bptt_segments", "gap_read_segments", "gap_gradient_segments", "loss_tokens"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1, or null")
        known = self.replay_checkpoints in ("every", "sqrt")
        _require(known, "replay_checkpoints", self.replay_checkpoints, "every or sqrt")
        if self.replay_checkpoints == "sqrt" and self.replay_segments is None:
            raise InputError("replay_checkpoints is 'sqrt' but nothing is replayed: set replay_segments, or use every")
        read, learned = self.gap_read_segments, self.gap_gradient_segments
        if read and learned and learned > read:
            raise InputError(
                f"gap_gradient_segments is {learned}, but no more than gap_read_segments = {read} are read: lower the one or raise the other"
            )
        if learned and (self.replay_segments or self.bptt_segments):
            raise InputError(
                f"gap_gradient_segments is {learned}, but replay_segments and bptt_segments read every gap without gradient: "
                "set it to null, or these two"
            )
        if self.replay_segments and self.bptt_segments and self.bptt_segments % self.replay_segments:
            raise InputError(
                f"bptt_segments is {self.bptt_segments} but must be a multiple of replay_segments = {self.replay_segments}: "
                "gradients stop between groups"
            )

    def identity(self) -> dict:
        """The settings that decide what is computed; a run resumes only where they are the same."""
        return {name: value for name, value in asdict(self).items() if name not in _CONVENIENCE}


def _require(ok: bool, name: str, value: object, limit: str) -> None:
    if not ok:
        raise InputError(f"{name} is {value!r} but must be {limit}")
