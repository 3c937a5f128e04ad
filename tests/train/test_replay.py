"""Replay: the gradient of the parallel schedule with the activations of one group of segments."""

import dataclasses
import gc
import weakref

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer
from infini.data.batch import Batch, Gap
from infini.errors import InputError
from infini.train import train
from infini.train.loop import _schedule
from infini.train.replay import Replay, _stored
from infini.train.step import Parallel, take_step

N = 4


def build(rule="delta", local="sliding", **changes):
    torch.manual_seed(3)
    shape = dict(vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    normed = dict(qk_norm=rule != "deltanet", write_gate=True, num_key_value_heads=2)
    model = InfiniTransformer(
        InfiniConfig(**shape | normed | changes, segment_length=N, update_rule=rule, local_attention=local)
    ).double()
    for name, parameter in model.named_parameters():  # gates away from the symmetric start
        if "beta" in name or "write_gate" in name:
            torch.nn.init.normal_(parameter)
    for parameter in model.parameters():  # at the starting scale of the weights hardly anything passes a memory
        parameter.data.mul_(3)
    return model


def rows(segments=6, short=0, gap=None, batch=2):
    """Rows of whole segments, the last one `short` tokens shorter."""
    random = torch.Generator().manual_seed(5)
    tokens = torch.randint(12, (batch, segments * N + 1 - short), generator=random)
    answer = torch.rand(tokens.shape, generator=random) < 0.3
    if gap is not None:
        gap = Gap(gap, 5, torch.randint(12, (batch, 3), generator=random))
        answer[:, gap.position * N] = False
    return Batch(tokens, answer, segments, gap)


def weigh(sums):
    return sums.tokens / 7 + sums.answers / 3


def gradients(schedule, model, batch):
    model.zero_grad()
    sums, _ = schedule.learn(model, batch, weigh)
    return sums, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found, expected):
    # fp64 throughout but for the loss, which is taken in fp32.
    for one, other in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=2e-6 * scale, msg=name)


@pytest.fixture
def exact_loss(monkeypatch):
    """The loss in fp64 too, so that gradients can be compared to twelve digits."""
    from infini.train import loss

    def span(model, batch, start, stop, state=None):
        logits, state = loss.read_span(model, batch, start, stop, state)
        following = batch.tokens[:, start + 1 : stop + 1]
        if batch.gap is not None and stop == batch.gap.position * N:
            following = torch.cat([following[:, :-1], batch.gap.piece(0, 1)], dim=1)
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), following, reduction="none")
        if batch.reset is not None:
            losses = losses * ~batch.reset[:, start + 1 : stop + 1]
        return loss.LossSums(losses.sum(), (losses * batch.answer[:, start + 1 : stop + 1]).sum()), state

    for module in ("loss", "step", "replay", "long_gap"):
        monkeypatch.setattr(f"infini.train.{module}.loss_of_span", span)


def assert_equal(found, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10 * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize("rule", ["linear", "delta", "gamma_delta", "deltanet"])
@pytest.mark.parametrize("local", ["segment", "sliding"])
@pytest.mark.parametrize("group", [1, 2, 4])  # 7 segments: with 2 and 4 the last group is not full
@pytest.mark.parametrize("checkpoints", ["every", "sqrt"])
def test_the_gradient_is_that_of_the_parallel_schedule(exact_loss, rule, local, group, checkpoints):
    model, batch = build(rule, local), rows(segments=7, short=1)  # and the last segment is not full
    expected = gradients(Parallel(), model, batch)
    found = gradients(Replay(N, group, checkpoints=checkpoints), model, batch)
    assert_equal(found[1], expected[1])
    assert_equal(found[0]._asdict(), expected[0]._asdict())
    assert not found[0].tokens.requires_grad


@pytest.mark.parametrize("rule", ["linear", "delta", "gamma_delta", "deltanet"])
@pytest.mark.parametrize("group", [1, 2])  # a gap at 3 parts a group of two
@pytest.mark.parametrize("checkpoints", ["every", "sqrt"])
def test_with_a_long_gap_too(exact_loss, rule, group, checkpoints):
    model, batch = build(rule), rows(gap=3)
    expected = gradients(Parallel(), model, batch)
    assert_equal(gradients(Replay(N, group, checkpoints=checkpoints), model, batch)[1], expected[1])


def test_a_wide_window_and_layers_without_memory(exact_loss):
    model, batch = build("linear", window=3 * N, memory_layers=(1,)), rows(segments=7)
    expected = gradients(Parallel(), model, batch)
    assert_equal(gradients(Replay(N, 1), model, batch)[1], expected[1])


def test_in_fp32_loss_and_with_recomputed_blocks():
    model, batch = build(), rows()
    expected = gradients(Parallel(), model, batch)
    model.enable_recompute()
    assert_same(gradients(Replay(N, 2), model, batch), expected)


def test_gradients_add_to_those_that_are_there(exact_loss):
    model, one, two = build(), rows(), rows(segments=3)
    first, second = (gradients(Parallel(), model, batch)[1] for batch in (one, two))
    model.zero_grad()
    for batch in (one, two):
        Replay(N, 1).learn(model, batch, weigh)
    assert_equal({n: p.grad for n, p in model.named_parameters()}, {n: first[n] + second[n] for n in first})


def cut(batch, every, model):
    """Autograd over the whole row with the state detached at every `every`-th border."""
    state, total = None, 0
    for start in range(0, batch.tokens.shape[1] - 1, every * N):
        stop = min(start + every * N, batch.tokens.shape[1] - 1)
        logits, state = model(batch.tokens[:, start:stop], state and state.detach())
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch.tokens[:, start + 1 : stop + 1], reduction="none"
        )
        total = total + losses.sum() / 7 + (losses * batch.answer[:, start + 1 : stop + 1]).sum() / 3
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("group", "bptt"), [(1, 2), (2, 2), (1, 3), (2, 4), (3, 6)])
def test_truncation_is_a_state_detached_at_these_borders(exact_loss, group, bptt):
    model, batch = build(), rows(segments=7)
    found = gradients(Replay(N, group, bptt), model, batch)
    assert_equal(found[1], cut(batch, bptt, model))
    whole = gradients(Parallel(), model, batch)
    assert_equal(found[0]._asdict(), whole[0]._asdict())  # values are not truncated
    values = "blocks.0.attention.v_proj.weight"
    assert (found[1][values] - whole[1][values]).norm() > 1e-3 * whole[1][values].norm()


@pytest.mark.parametrize("bptt", [2, 4, None])
def test_the_gradient_beyond_the_truncation_is_zero(bptt):
    # A vector for each place of the row stands in for the embedding: its gradient says how far back the last loss looks.
    model, batch = build(), rows(segments=6)
    places = torch.nn.Parameter(torch.randn(2, 6 * N, 16, dtype=torch.float64))
    original, at = model.embedding, {"start": 0}

    class Places(torch.nn.Module):
        def forward(self, tokens):
            start = at["start"]
            return places[:, start : start + tokens.shape[1]]

    del model.embedding
    model.embedding = Places()
    model.embedding.weight = original.weight

    def placed(tokens, state=None, **keywords):
        at["start"] = 0 if state is None else int(state.tokens_seen[0])
        return model(tokens, state, **keywords)

    answer = torch.zeros_like(batch.answer)
    answer[:, -1] = True  # predicted in the sixth segment
    last_alone = dataclasses.replace(batch, answer=answer)
    Replay(N, 1, bptt).learn(placed, last_alone, lambda sums: sums.answers)
    reached = places.grad.unflatten(1, (6, N)).abs().amax(dim=(0, 2, 3)) > 0
    first = 0 if bptt is None else (5 // bptt) * bptt
    assert reached.tolist() == [segment >= first for segment in range(6)]


class Box(list):
    """A list that can be watched for its end."""


class SavedBytes:
    """Counts the bytes that autograd keeps for the backward pass, at most: without parameters and the row's tokens."""

    def __init__(self, model, batch):
        given = [*model.parameters(), batch.tokens, batch.answer]
        self._own = {x.untyped_storage().data_ptr() for x in given}
        self._held = {}  # storage: [references, bytes]
        self.peak = 0

    def _release(self, place):
        self._held[place][0] -= 1
        if not self._held[place][0]:
            del self._held[place]

    def pack(self, x):
        place = x.untyped_storage().data_ptr()
        box = Box([x])
        if place not in self._own:
            self._held.setdefault(place, [0, x.untyped_storage().nbytes()])[0] += 1
            weakref.finalize(box, self._release, place)
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return box

    def __enter__(self):
        gc.collect()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box[0])
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        return self._hooks.__exit__(*error)


def peak_bytes(schedule, segments, gap=None):
    model, batch = build(), rows(segments, gap=gap)
    with SavedBytes(model, batch) as saved:
        schedule.learn(model, batch, weigh)
    return saved.peak


@pytest.mark.parametrize("checkpoints", ["every", "sqrt"])
def test_activations_do_not_grow_with_the_row(checkpoints):
    parallel = {s: peak_bytes(Parallel(), s) for s in (4, 8, 16)}
    replay = {s: peak_bytes(Replay(N, 1, checkpoints=checkpoints), s) for s in (4, 8, 16)}
    pairs = {s: peak_bytes(Replay(N, 2, checkpoints=checkpoints), s) for s in (4, 8, 16)}
    print(f"bytes saved for backward: parallel {parallel}, one segment at a time {replay}, two {pairs}")
    assert replay[4] == replay[8] == replay[16] and pairs[4] == pairs[8] == pairs[16]
    assert parallel[16] > 3 * parallel[4] > 6 * replay[4]
    assert replay[4] < pairs[4] < 2 * replay[4] + 1
    assert peak_bytes(Parallel(), 4, gap=2) > peak_bytes(Replay(N, 1), 4, gap=2)


def states_alive(schedule, segments):
    """Most states alive at a time."""
    model, alive, most = build(), [], 0

    def watch(tokens, state=None, **keywords):
        nonlocal most
        logits, after = model(tokens, state, **keywords)
        alive.extend(weakref.ref(x.layers[0].memory.matrix) for x in (state, after) if x is not None)
        most = max(most, len({id(x) for x in (ref() for ref in alive) if x is not None}))
        return logits, after

    schedule.learn(watch, rows(segments), weigh)
    return most


def test_sqrt_keeps_the_square_root_of_the_states():
    every = {s: states_alive(Replay(N, 1), s) for s in (16, 64)}
    sqrt = {s: states_alive(Replay(N, 1, checkpoints="sqrt"), s) for s in (16, 64)}
    print(f"states alive: every {every}, sqrt {sqrt}")
    assert every[64] - every[16] == 48
    assert sqrt[64] - sqrt[16] == 8  # 2 (sqrt(64) - sqrt(16))
    assert sqrt[64] <= 2 * 8 + 2


def test_a_kept_state_does_not_keep_a_whole_group_alive():
    model = build("linear")
    _, state = model(rows(segments=16).tokens[:, :-1])
    layer = state.layers[0]
    assert layer.keys.untyped_storage().nbytes() > layer.keys.nbytes  # a view into the whole line
    for kept in _stored(state).layers:
        for tensor in kept.tensors().values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            assert not tensor.requires_grad


def test_the_state_behind_a_batch_does_not_keep_its_last_group_alive():
    """It is held while all groups before are replayed."""
    _, end = Replay(N, 2).learn(build("linear"), rows(), weigh)
    for layer in end.layers:
        for tensor in layer.tensors().values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def forward_tokens(schedule, segments=8):
    model, read = build(), []

    def count(tokens, *state, **keywords):
        read.append(tokens.shape[1] / N)
        return model(tokens, *state, **keywords)

    schedule.learn(count, rows(segments), weigh)
    return sum(read)


@pytest.mark.parametrize(
    ("schedule", "segments"),
    [
        (Parallel(), 8),
        (Replay(N, 1), 7 + 8),  # the last group is read once only
        (Replay(N, 2, 2), 8),  # pieces of one group need no replay
        (Replay(N, 1, 4), 3 + 4 + 3 + 4),
        (Replay(N, 1, checkpoints="sqrt"), 7 + (2 + 2 + 1) + 8),  # three groups of 3, 3, 2
    ],
)
def test_what_is_read_again(schedule, segments):
    assert forward_tokens(schedule) == segments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(checkpoints="some"), "checkpoints is 'some'; choose every or sqrt"),
        (dict(group=3, bptt_segments=2), "bptt_segments is 2; it must be a multiple of group = 3"),
        (dict(bptt_segments=0), "bptt_segments is 0"),
        (dict(group=0), "group is 0; it must be at least 1"),
    ],
)
def test_a_schedule_that_would_cut_elsewhere_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Replay(**dict(segment_length=N, group=1) | changes)


def test_the_probe_loss_is_the_same_without_a_graph():
    model = build()
    for batch in (rows(), rows(gap=2)):
        found, expected = Replay(N, 2).loss(model, batch), Parallel().loss(model, batch)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
            assert not one.requires_grad


def test_a_step_is_the_same_step(settings):
    class Watched(torch.optim.SGD):
        def step(self):
            self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]

    results = []
    for schedule in (Parallel(), Replay(N, 1)):
        model = build()
        optimizer = Watched(model.parameters())
        batches = [rows(), rows(segments=3), rows(gap=2)]
        results.append((take_step(model, optimizer, batches, 1e9, torch.device("cpu"), schedule), optimizer.seen))
    (one, one_seen), (other, other_seen) = results
    assert (one.tokens, one.answers) == (other.tokens, other.answers)
    torch.testing.assert_close(one.gradient_norm, other.gradient_norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(one.sums.tokens, other.sums.tokens, rtol=1e-6, atol=0)
    for a, b in zip(one_seen, other_seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Parallel),
        (dict(replay_segments=2), Replay(N, 2)),
        (dict(replay_segments=2, bptt_segments=6, replay_checkpoints="sqrt"), Replay(N, 2, 6, "sqrt")),
        (dict(bptt_segments=3), Replay(N, 3, 3)),
    ],
)
def test_the_settings_choose_the_schedule(settings, changes, expected):
    chosen = _schedule(settings(**changes), N)
    assert chosen == expected if isinstance(expected, Replay) else isinstance(chosen, expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(replay_segments=0), "replay_segments is 0 but must be at least 1"),
        (dict(bptt_segments=-1), "bptt_segments is -1 but must be at least 1"),
        (dict(replay_segments=2, bptt_segments=3), "3 but must be a multiple of replay_segments = 2"),
        (dict(replay_segments=2, replay_checkpoints="some"), "'some' but must be every or sqrt"),
        (dict(replay_checkpoints="sqrt"), "nothing is replayed"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, changes, words):
    with pytest.raises(InputError, match=words):
        settings(**changes)


def test_a_model_without_such_a_state_is_refused(tiny_model, copy_source):
    class KeepsNothing(torch.nn.Module):
        def forward(self, tokens, state=None, keep="all"):
            return None, torch.zeros(1)

    with pytest.raises(InputError, match="a Tensor and not a StreamState; .* set replay_segments=null"):
        Replay(N, 1).learn(KeepsNothing(), copy_source()[0].to("cpu"), weigh)


@pytest.mark.parametrize(
    ("changes", "most"),
    [(dict(replay_segments=1), 1), (dict(replay_segments=1, bptt_segments=2), 1), (dict(bptt_segments=2), 2), ({}, 3)],
)
def test_the_loop_learns_and_probes_by_replay(settings, tmp_path, changes, most, copy_source):
    model, read = build().float(), []
    model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1] // N))
    s = settings(steps=40, warmup_steps=5, learning_rate=3e-3, precision="bf16", **changes)
    metrics = train(model, copy_source(steps=40, fixed=True), s, tmp_path)
    assert max(read) == min(most, copy_source(fixed=True)[0].segments)
    assert metrics["loss"] < 2.0  # of 2 ln 12 = 5.0
