"""Rows that go on where the batch before ended, and documents that begin inside them."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from infini import InfiniConfig, InfiniTransformer
from infini.data.batch import Batch, Gap
from infini.errors import InputError
from infini.train import train
from infini.train.loss import loss_of
from infini.train.replay import Replay
from infini.train.step import Parallel, take_step
from infini.train.streams import Streams

CPU, N, ROWS, SEGMENTS = torch.device("cpu"), 4, 2, 3
WINDOW = N * SEGMENTS


def build(seed=0, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    options = dict(segment_length=N, initializer_range=0.3) | changes
    return InfiniTransformer(InfiniConfig.long(**sizes, **options)).to(dtype)


@dataclasses.dataclass(frozen=True)
class Text:
    """Two streams that take turns, each of rows cut from one long text in which documents begin here and there."""

    steps: int = 8
    streams: int = 2
    seed: int = 0
    documents: bool = True

    def whole(self, stream):
        random = torch.Generator().manual_seed(100 * self.seed + stream)
        shape = (ROWS, self.steps * WINDOW + 1)
        tokens, begins = torch.randint(12, shape, generator=random), torch.rand(shape, generator=random) < 0.06
        answer = (torch.rand(shape, generator=random) < 0.2) & ~begins
        return tokens, answer, begins if self.documents else torch.zeros_like(begins)

    def __len__(self):
        return self.steps

    def __getitem__(self, index):
        stream, start = index % self.streams, index // self.streams * WINDOW
        parts = [x[:, start : start + WINDOW + 1].clone() for x in self.whole(stream)]
        return Batch(*parts[:2], SEGMENTS, stream=stream, reset=parts[2])


class Watched(torch.optim.SGD):
    """Keeps the gradients that it was given, and changes nothing."""

    def step(self):
        self.seen = {i: p.grad.clone() for i, p in enumerate(self.param_groups[0]["params"])}


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def test_batches_of_a_stream_cost_what_the_whole_text_costs():
    model, source, streams, total = build(), Text(steps=4, streams=1), Streams(), None
    tokens = answers = 0
    for i in range(4):
        result = take_step(model, Watched(model.parameters()), [source[i]], 1e9, CPU, streams=streams)
        total = result.sums if total is None else total.plus(result.sums)
        tokens, answers = tokens + result.tokens, answers + result.answers
    text, answer, begins = source.whole(0)
    assert begins.any() and tokens == (~begins[:, 1:]).sum() and answers == answer[:, 1:].sum()
    whole = loss_of(model, Batch(text, answer, segments=12, reset=begins))
    torch.testing.assert_close(total.tokens, whole.tokens.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(total.answers, whole.answers.detach(), rtol=1e-6, atol=0)


def test_each_document_costs_what_it_costs_alone():
    """What stands before it is neither attended nor remembered, and does not predict its first token."""
    model, (text, _, begins) = build(), Text(steps=4).whole(0)
    none = torch.zeros_like(begins)
    together = loss_of(model, Batch(text, none, segments=12, reset=begins)).tokens
    apart = 0
    for row in range(ROWS):
        borders = sorted({0, *begins[row].nonzero().flatten().tolist(), text.shape[1]})
        for start, stop in zip(borders, borders[1:], strict=False):
            if stop - start > 1:
                document = text[row : row + 1, start:stop]
                apart += loss_of(model, Batch(document, torch.zeros_like(document, dtype=bool), segments=1)).tokens
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", [Parallel(), Replay(N, 1), Replay(N, 2, checkpoints="sqrt")], ids=["parallel", "every", "sqrt"])
def test_the_gradient_is_that_of_the_whole_text_truncated_where_batches_end(schedule):
    model, source, streams = build(), Text(steps=3, streams=1), Streams()
    optimizer = Watched(model.parameters())
    # Every batch of one step has the same weights: together they are the text in one row.
    take_step(model, optimizer, [source[i] for i in range(3)], 1e9, CPU, schedule, streams=streams)
    text, answer, begins = source.whole(0)
    truncated = Watched(model.parameters())
    take_step(
        model, truncated, [Batch(text, answer, 9, reset=begins)], 1e9, CPU, Replay(N, SEGMENTS, SEGMENTS), streams=Streams()
    )
    for i, expected in truncated.seen.items():
        torch.testing.assert_close(optimizer.seen[i], expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def test_replay_equals_parallel_after_a_state_and_across_documents():
    model, source = build(), Text(streams=1)
    for i in range(2):
        _, state = model(source[0].tokens[:, :-1]) if i else (None, None)
        found = []
        for schedule in (Parallel(), Replay(N, 1)):
            model.zero_grad()
            sums, end = schedule.learn(model, source[i], lambda sums: sums.tokens / 5, state and state.detach())
            found.append((sums, [p.grad.clone() for p in model.parameters()], end))
        torch.testing.assert_close(found[0][0].tokens, found[1][0].tokens, rtol=1e-6, atol=0)
        for one, other in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-6 * one.abs().max().item())
        for one, other in zip(found[0][2].layers, found[1][2].layers, strict=True):
            torch.testing.assert_close(one.memory.matrix.detach(), other.memory.matrix, rtol=1e-9, atol=1e-9)


def test_streams_keep_apart_and_batches_of_none_begin_anew():
    streams, model, source = Streams(), build(), Text()
    alone = dataclasses.replace(source[0], stream=None)
    started = []
    for batch in (source[0], source[1], alone, source[2], source[3]):
        started.append(streams.begin(batch))
        assert streams.start is started[-1]
        streams.end(batch, model(batch.tokens[:, :-1], started[-1], reset=batch.reset[:, :-1])[1])
    assert started[:3] == [None, None, None]
    for i, state in ((0, started[3]), (1, started[4])):
        expected = model(source[i].tokens[:, :-1], reset=source[i].reset[:, :-1])[1]
        assert torch.equal(state.layers[1].memory.matrix, expected.layers[1].memory.matrix)
        assert not state.layers[1].memory.matrix.requires_grad
    for begins in (alone, dataclasses.replace(source[0], stream=2)):
        assert streams.begin(begins) is None is streams.start


def test_a_state_is_no_view_that_keeps_activations_alive():
    streams, model, batch = Streams(), build(), Text()[0]
    streams.end(batch, model(batch.tokens[:, :-1])[1])
    state = streams.begin(batch)
    for layer in state.layers:
        for tensor in layer.tensors().values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize(("precision", "changes"), [("fp32", {}), ("bf16", {}), ("fp32", dict(bptt_segments=2))])
def test_stopped_and_resumed_a_run_has_the_same_bits(settings, tmp_path, precision, changes):
    s = settings(steps=6, accumulation=2, checkpoint_every=2, knockout_every=3, precision=precision, learning_rate=0.01, **changes)

    class Cut(Text):
        def __getitem__(self, index):
            if index == 9:
                raise RuntimeError("power cut")
            return super().__getitem__(index)

    Cut.__module__, Cut.__qualname__ = Text.__module__, Text.__qualname__
    whole, resumed = build(dtype=torch.float32), build(5, torch.float32)
    reached = train(whole, Text(steps=12), s, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        train(build(dtype=torch.float32), Cut(steps=12), s, tmp_path / "halves")
    again = train(resumed, Text(steps=12), s, tmp_path / "halves")
    cut = changes.get("bptt_segments", SEGMENTS) * WINDOW // SEGMENTS
    assert reached["gradient_tokens"] == again["gradient_tokens"] == cut
    assert reached["text_tokens"] == again["text_tokens"]
    expected = whole.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in resumed.state_dict().items())
    curves = [
        [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_second", "peak_memory_bytes")} for line in lines]
        for lines in ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "halves"))
    ]
    assert curves[0] == curves[1]
    for i in range(2):
        kept = [load_file(next((tmp_path / name).rglob(f"stream-{i}.safetensors"))) for name in ("whole", "halves")]
        assert len(kept[0]) > 8 and all(torch.equal(x, kept[1][name]) for name, x in kept[0].items())


def test_the_longest_document_so_far_is_that_of_the_longest_row():
    streams, model, batch = Streams(), build(), dataclasses.replace(Text(streams=1)[0], reset=None)
    reset = torch.zeros_like(batch.answer)
    reset[0, 5] = True
    _, state = model(batch.tokens[:, :-1], reset=reset[:, :-1])
    streams.end(batch, state)
    streams.end(dataclasses.replace(batch, stream=1), model(batch.tokens[:, :-1], state)[1])
    assert streams.tokens_seen(batch) == WINDOW
    assert streams.tokens_seen(dataclasses.replace(batch, stream=None)) == 0


def test_a_run_says_how_long_its_documents_were(settings, tmp_path):
    source = Text(steps=6, documents=False)
    reached = train(build(dtype=torch.float32), source, settings(steps=3, accumulation=2, precision="fp32"), tmp_path)
    assert (reached["gradient_tokens"], reached["text_tokens"]) == (WINDOW, 3 * WINDOW)


def test_the_probe_starts_where_the_step_did(settings, tmp_path):
    model, starts = build(dtype=torch.float32), []

    def note(module, arguments, keywords):
        state = arguments[1] if len(arguments) > 1 else None
        starts.append((keywords.get("memory", True), torch.is_grad_enabled(), state))

    model.register_forward_pre_hook(note, with_kwargs=True)
    train(model, Text(steps=3, streams=1), settings(steps=3, knockout_every=1), tmp_path)
    assert [(memory, learns) for memory, learns, _ in starts] == [(True, True), (True, False), (False, False)] * 3
    for i in range(3):
        step, probe, silenced = (state for _, _, state in starts[3 * i : 3 * i + 3])
        assert (step is None) == (i == 0) and probe is step and silenced is step


def test_the_first_token_of_a_document_is_no_answer_and_is_not_counted():
    tokens = torch.randint(12, (2, 5))
    reset = torch.zeros(2, 5, dtype=torch.bool)
    reset[0, 3] = reset[1, 0] = True
    batch = Batch(tokens, ~reset, segments=1, stream=0, reset=reset)
    assert batch.predicted_tokens == 7
    assert batch.to("cpu").reset is reset
    for wrong in (reset[:, 1:], reset.float()):
        with pytest.raises(InputError, match=r"reset is .*; it must be bool \[2, 5\] on the CPU"):
            Batch(tokens, ~reset, segments=1, reset=wrong)
    with pytest.raises(InputError, match="the first token of a document is an answer"):
        Batch(tokens, reset, segments=1, reset=reset)
    gap = Gap(1, 1, torch.zeros(2, 1, dtype=torch.long))
    for own in (dict(stream=0), dict(reset=reset)):
        with pytest.raises(InputError, match="around a gap are texts of their own"):
            Batch(tokens, torch.zeros_like(reset), 2, gap, **own)
