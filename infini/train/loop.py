"""The training loop, for any model of the protocol."""

from __future__ import annotations

import logging
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from infini.data.loader import BatchSource, load_batches
from infini.errors import InputError
from infini.report.record import make_record, read_record, write_record
from infini.train.checkpoint import Progress, latest_checkpoint, load_checkpoint, save_checkpoint
from infini.train.compile_watch import CompileWatch
from infini.train.held_out import HeldOut
from infini.train.interrupt import StopRequest
from infini.train.long_gap import require_linear
from infini.train.metrics import MetricsLog
from infini.train.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from infini.train.reach import reach_of, write_reach
from infini.train.replay import Replay
from infini.train.run_folder import claim, whole_folder
from infini.train.settings import TrainSettings
from infini.train.step import Parallel, Schedule, take_step
from infini.train.streams import Streams
from infini.train.stretch import require_stretchable
from infini.train.telemetry import GateWatch, knock_out
from infini.train.window import Window

logger = logging.getLogger(__name__)


def train(
    model: nn.Module,
    source: BatchSource,
    settings: TrainSettings,
    output: Path,
    *,
    overrides: Sequence[str] = (),
    origin: Mapping[str, Any] | None = None,
) -> dict:
    """Train ``model`` on ``source`` and leave everything about the run in ``output``.

    Each step predicts ``tokens[:, 1:]`` from ``tokens[:, :-1]`` of ``settings.accumulation``
    batches and minimizes the loss of :mod:`infini.train.loss`: all segments of a row at once, or in the order of
    :mod:`infini.train.replay`; across the gap of a batch that has one as :mod:`infini.train.long_gap` says;
    from the end of the batch before where the source's batches make a stream, see :mod:`infini.train.streams`.
    Parameters, optimizer and the model's memories are fp32; ``precision="bf16"`` is autocast around
    the model alone. Between two lines of metrics the host never waits for the device.

    ``output`` receives ``run.json`` (which run this is), ``metrics.jsonl``, ``checkpoints/``,
    ``model/`` (16-bit, for ``from_pretrained``), where held-out text is read ``best/model/``, and at the end ``record.json``. Called again with
    the same arguments, an unfinished run goes on from its last checkpoint, a finished one returns
    its result. On CPU the resumed run equals the uninterrupted one bit for bit.

    Args:
        model: a :class:`~infini.protocol.TrainableModel`; moved to the device and trained in place.
        source: random access to batches, see :mod:`infini.data.loader`.
        settings: see :class:`TrainSettings`.
        output: folder of this run.
        overrides: how the run was asked for, ("model=rmt", "seed=1"); kept in the record, the name of the run in tables.
        origin: where weights that are not random come from: their checksum, and gradient_tokens and text_tokens of their own training.

    Returns:
        The record's metrics: steps, tokens, parameters, seconds, tokens_per_second,
        peak_memory_bytes, the last losses (nats) and the last knock-out; epochs where the source counts them, and what
        :meth:`infini.train.held_out.HeldOut.result` says.

    Raises:
        InputError: the folder holds another run, the source is too short, the device is missing,
            a loss is not finite, or no space is left.
        KeyboardInterrupt: SIGINT or SIGTERM came; the step was finished and a checkpoint written.
    """
    started, output = time.time(), Path(output)
    device = _device(settings.device)
    _check_length(source, settings)
    if settings.gap_read_segments is not None:  # now, and not at the first gap that is longer
        require_stretchable(getattr(model.config, "update_rule", ""))
    if settings.gap_gradient_segments is not None:
        require_linear(getattr(model.config, "update_rule", "linear"))
    held_out = HeldOut(source, settings, output)
    run = {
        "model": {"class": _name(type(model)), **model.config.to_dict()},
        "data": _describe(source),
        "settings": settings.identity(),
        **({} if origin is None else {"origin": dict(origin)}),
    }
    claim(output, run)
    if (output / "record.json").exists():
        return read_record(output / "record.json")["metrics"]

    _seed_everything(settings.seed)
    model.to(device).train()
    if settings.recompute:
        model.enable_recompute()
    model.loss_tokens = settings.loss_tokens
    if settings.compile:
        model.enable_compile()
    optimizer = build_optimizer(model, settings)
    progress, streams = Progress(), Streams()
    if origin is not None:
        progress.reached(origin.get("gradient_tokens", 0), origin.get("text_tokens", 0))
    if checkpoint := latest_checkpoint(output / "checkpoints"):
        progress = load_checkpoint(checkpoint, model, optimizer, streams)
        logger.info("going on from %s", checkpoint)
        held_out.keep(model, progress)

    with MetricsLog(output, progress.step, tensorboard=settings.tensorboard) as log:
        _run_steps(model, source, settings, output, device, optimizer, progress, streams, held_out, log)
        last, telemetry = log.last("loss"), log.last("knockout_token_loss")

    with whole_folder(output / "model") as folder:
        model.save_pretrained(folder, dtype=torch.float16)
        write_reach(folder, progress.gradient_tokens, progress.text_tokens)
    metrics = {
        "steps": progress.step,
        "tokens": progress.tokens,
        **_epochs(source, progress.step, settings),
        "gradient_tokens": progress.gradient_tokens,
        "text_tokens": progress.text_tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": progress.seconds,
        "tokens_per_second": progress.tokens / progress.seconds,
        "peak_memory_bytes": last["peak_memory_bytes"],
        **{key: last[key] for key in ("loss", "token_loss", "answer_loss")},
        **{key: telemetry[key] for key in ("knockout_token_loss", "knockout_answer_loss")},
        **held_out.result(progress),
    }
    record = make_record(
        "train",
        config={"model": run["model"], "settings": {**asdict(settings), "device": str(device)}},
        data=run["data"] | ({} if origin is None else {"origin": run["origin"]}),
        seeds={"train": settings.seed, "data": run["data"].get("seed", settings.seed)},
        started=started,
        overrides=list(overrides),
        metrics=metrics,
    )
    write_record(record, output / "record.json")
    return metrics


def _run_steps(
    model: nn.Module,
    source: BatchSource,
    settings: TrainSettings,
    output: Path,
    device: torch.device,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    streams: Streams,
    held_out: HeldOut,
    log: MetricsLog,
) -> None:
    """Take the steps from ``progress.step`` to the end, or to where held-out text says so, moving ``progress`` and ``streams`` along."""
    called = _in_precision(model, device, settings.precision)
    schedule = _schedule(settings, model.config.segment_length)
    gates = GateWatch(model)
    batches_ahead = load_batches(
        source,
        progress.step * settings.accumulation,
        settings.steps * settings.accumulation,
        workers=settings.workers,
        pin_memory=device.type == "cuda",
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    bar = tqdm(
        total=settings.steps,
        initial=progress.step,
        unit="step",
        desc=output.name,  # of a sweep's job: what tells it from the others
        mininterval=0.1 if sys.stderr.isatty() else 30,
    )
    weights = settings.token_weight, settings.answer_weight
    window = Window(*weights)

    # Closed whatever happens: an error keeps this frame, and the process would wait at its end for workers that nobody let go of.
    with closing(batches_ahead) as data, StopRequest() as stop, CompileWatch(settings.compile) as compiler, bar:
        while progress.step < settings.steps and not held_out.over(progress):
            batches = [next(data) for _ in range(settings.accumulation)]
            rate = learning_rate_at(progress.step, settings)
            set_learning_rate(optimizer, rate)
            result = take_step(
                called, optimizer, batches, settings.clip, device, schedule, settings.token_weight, streams, settings.answer_weight
            )
            progress.step += 1
            compiler.tell(progress.step)
            for batch in batches:
                progress.reached(*reach_of(batch, settings.bptt_segments, streams.tokens_seen(batch), settings.gap_gradient_segments))
            window.add(progress.step, result)
            bar.update()

            ends = stop.requested or progress.step == settings.steps
            saves = ends or progress.step % settings.checkpoint_every == 0
            # Also after the first step: a dead gate should be told at once.
            probes = ends or progress.step % settings.knockout_every == 0 or progress.step == 1
            validates = held_out.due(progress.step)
            if saves or probes or validates or progress.step % settings.log_every == 0:
                # Before anything else: weights that a NaN has spoiled are neither probed nor saved.
                measured = window.read()
                progress.tokens += window.tokens
                progress.seconds += window.seconds
                row = {"step": progress.step, "tokens": progress.tokens, **_epochs(source, progress.step, settings), **measured}
                row["learning_rate"] = rate
                row["seconds"] = progress.seconds
                row["tokens_per_second"] = window.tokens / window.seconds
                row["peak_memory_bytes"] = _peak_memory_bytes(device)
                log.write(row)
                bar.set_postfix_str(_in_short(row), refresh=False)
                window = Window(*weights)
            if probes:
                if batches[-1].segments > 1:  # a single segment asks nothing of the memory
                    gates.check()
                # Behind the first step this also compiles what is read without gradient, a long gap or a replay, later on.
                loss_of = partial(schedule.loss, state=streams.start)  # the start that the step had
                probe = knock_out(loss_of, called, batches[-1].to(device))
                compiler.tell(progress.step)
                log.write({"step": progress.step, **probe})
            if validates:
                log.write(held_out.measure(model, device, progress))
                window = Window(*weights)  # its clock counts training alone
                saves = saves or progress.best_step == progress.step or held_out.over(progress)
            if saves:
                saved = save_checkpoint(output / "checkpoints", model, optimizer, progress, streams)
                held_out.keep(model, progress)
            if ends and progress.step < settings.steps:  # `stop` may have come since: then the next step ends
                raise KeyboardInterrupt(
                    f"stopped after step {progress.step} of {settings.steps}; {saved} is written: "
                    "run the same command again to go on"
                )


def _in_precision(model: Callable, device: torch.device, precision: str) -> Callable:
    def call(*arguments, **keywords):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model(*arguments, **keywords)

    return call


def _schedule(settings: TrainSettings, segment_length: int) -> Schedule:
    group = settings.replay_segments or settings.bptt_segments
    if group is None:
        return Parallel(settings.gap_read_segments, settings.gap_gradient_segments)
    return Replay(segment_length, group, settings.bptt_segments, settings.replay_checkpoints, settings.gap_read_segments)


def _epochs(source: BatchSource, steps: int, settings: TrainSettings) -> dict[str, float]:
    """How often ``source`` has been read after so many steps, where it can say so."""
    return {"epochs": source.epochs(steps * settings.accumulation)} if hasattr(source, "epochs") else {}


def _in_short(row: dict) -> str:
    speed, memory = row["tokens_per_second"], row["peak_memory_bytes"] / 2**20
    return f"loss {row['loss']:.3f}, {speed:,.0f} tokens/s, {memory:,.0f} MiB"


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device is {name!r}: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device is {name!r} but torch finds no CUDA GPU: use device=cpu")
    return device


def _check_length(source: BatchSource, settings: TrainSettings) -> None:
    needed = settings.steps * settings.accumulation
    if hasattr(source, "__len__") and len(source) != needed:
        raise InputError(
            f"the data has {len(source)} batches but steps x accumulation is {needed}: make them equal, "
            "the curriculum follows the number of batches"
        )


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _describe(source: BatchSource) -> dict:
    """What the data is made of, as plain values: the class, of a dataclass its fields, and the digests of files it read."""
    settings = fields(source) if is_dataclass(source) else ()
    plain = {f.name: getattr(source, f.name) for f in settings if f.init}
    return {"class": _name(type(source)), **plain, **getattr(source, "digests", {})}


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
