"""A gap that is read in part and counts in whole."""

import dataclasses

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer, memory
from infini.data.batch import Batch, Gap
from infini.errors import InputError
from infini.memory import MemoryState
from infini.train import train
from infini.train.long_gap import carry_on, cross, gap_loss_of
from infini.train.loop import _schedule
from infini.train.replay import Replay
from infini.train.step import Parallel
from infini.train.stretch import stretch

N = 4
RULES = ("linear", "deltanet")


def build(rule, layers=1):
    torch.manual_seed(3)
    sizes = dict(vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2)
    model = InfiniTransformer(
        InfiniConfig(**sizes, write_gate=True, segment_length=N, update_rule=rule, local_attention="sliding", initializer_range=0.2)
    )
    return model.double()


def gap_batch(gap, period=2 * N, segments=4):
    random = torch.Generator().manual_seed(5)
    tokens = torch.randint(12, (2, segments * N + 1), generator=random)
    filler = torch.randint(12, (2, period), generator=random, dtype=torch.uint8)
    answer = torch.zeros_like(tokens, dtype=torch.bool)
    answer[:, -3:] = True
    return Batch(tokens, answer, segments, Gap(2, gap, filler))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("times", [1, 2, 3, 7, 64])
def test_it_is_the_text_written_as_often(rule, times):
    keys = torch.rand(2, 3, N, 2, 5, dtype=torch.float64)
    keys = memory.unit(keys - 0.5) if rule == "deltanet" else keys
    arguments = keys, torch.rand(2, 3, N, 2, dtype=torch.float64), torch.randn(2, 3, N, 2, 6, dtype=torch.float64)
    before = MemoryState(torch.randn(2, 2, 5, 6).double(), None if rule == "deltanet" else torch.rand(2, 2, 5).double())
    expected = before
    for _ in range(times):
        _, expected = memory.write_segments(rule, expected, *arguments)
    _, after, carried = memory.write_segments_with_map(rule, before, *arguments)
    found, power = stretch(rule, before, after, carried, times)
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.allclose(one, other, rtol=1e-12, atol=1e-12)
    _, _, product = memory.write_segments_with_map(rule, before, *(x.repeat(1, times, *[1] * (x.dim() - 2)) for x in arguments))
    assert power is product is None or torch.allclose(power, product, rtol=1e-12, atol=1e-14)


WIDE = 64


def written_in_delta(times, held, strength):
    """A memory with so many times what 8 segments add in its normalizer; written once, and `times` times in truth and by estimate."""
    keys = memory.feature_map(torch.randn(1, 8, 64, 2, WIDE, dtype=torch.float64) * 1.5, "elu")
    arguments = keys, torch.rand(1, 8, 64, 2, dtype=torch.float64) * strength, torch.randn(1, 8, 64, 2, 8, dtype=torch.float64)
    before = MemoryState(torch.randn(1, 2, WIDE, 8).double(), held * torch.einsum("bsngd,bsng->bgd", *arguments[:2]))
    _, after, carried = memory.write_segments_with_map("delta", before, *arguments)
    _, *truth = memory.write_segments_with_map(
        "delta", before, *(x.repeat(1, times, *[1] * (x.dim() - 2)) for x in arguments)
    )
    return before, after, carried, truth, stretch("delta", before, after, carried, times)


def apart(found, true):
    return ((found - true).norm() / true.norm()).item()


@pytest.mark.parametrize("times", [1, 2, 7, 64])
def test_delta_is_exact_while_the_normalizer_is_large(times):
    before, after, carried, truth, (found, power) = written_in_delta(times, 1e6, 1.0)
    torch.testing.assert_close(found.normalizer, truth[0].normalizer)
    assert apart(found.matrix - before.matrix, truth[0].matrix - before.matrix) < 1e-3
    assert apart(power - torch.eye(WIDE).double(), truth[1] - torch.eye(WIDE).double()) < 1e-3


@pytest.mark.parametrize(("held", "strength", "limit"), [(4.0, 0.05, 0.06), (0.3, 1.0, 0.25)])
@pytest.mark.parametrize("times", [4, 16, 64])
def test_delta_is_near_where_each_turn_erases_less(times, held, strength, limit):
    before, after, carried, truth, (found, power) = written_in_delta(times, held, strength)
    assert apart(found.matrix, truth[0].matrix) < limit
    assert apart(power, truth[1]) < 0.03
    # The turns are not all alike, and they do erase.
    alike = torch.linalg.matrix_power(carried, times)
    summed = before.matrix + times * (after.matrix - before.matrix)
    assert apart(found.matrix, truth[0].matrix) < 0.7 * apart(summed, truth[0].matrix)
    assert apart(power, truth[1]) < 0.5 * apart(alike, truth[1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gap", [12, 40])
def test_repeated_filler_of_which_a_period_is_read_is_worth_the_whole_gap(rule, gap):
    """In one layer the filler's keys and values do not depend on the memory: then nothing is lost, nor in the gradient."""
    results = []
    for read_segments in (None, 4, 2):
        model = build(rule)
        sums = gap_loss_of(model, gap_batch(gap), read_segments)
        sum(sums).backward()
        results.append((torch.stack(tuple(sums)).detach(), {name: p.grad for name, p in model.named_parameters()}))
    for sums, gradients in results[1:]:
        torch.testing.assert_close(sums, results[0][0], rtol=1e-6, atol=0)
        for name, gradient in gradients.items():
            scale = results[0][1][name].abs().max().item()
            torch.testing.assert_close(gradient, results[0][1][name], rtol=0, atol=2e-6 * scale, msg=name)


@pytest.mark.parametrize(("gap", "read", "expected"), [(9, None, 9), (9, 9, 9), (9, 4, 3), (10, 4, 3), (1000, 16, 16), (5, 1, 1)])
def test_no_more_is_read_than_asked_for_and_it_is_the_end(gap, read, expected):
    model, batch, seen = build("linear"), gap_batch(gap, period=gap * N), []
    _, state = model(batch.tokens[:, : 2 * N])
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    cross(model, batch, state, read)
    assert torch.equal(torch.cat(seen, dim=1), batch.gap.piece((gap - expected) * N, gap * N))


def test_the_state_grows_with_the_gap_that_is_meant_and_keeps_its_direct_path():
    model, batch = build("linear", layers=2), gap_batch(400)
    _, state = model(batch.tokens[:, : 2 * N])
    read, meant = (cross(model, batch, state, segments) for segments in (None, 8))
    for layer in range(2):
        whole, stretched = (crossing.end.layers[layer].memory.normalizer for crossing in (read, meant))
        torch.testing.assert_close(stretched, whole, rtol=0.3, atol=0)  # what was read of the memory has changed since
    assert carry_on(state, meant).layers[1].memory.matrix.requires_grad


@pytest.mark.parametrize("rule", RULES)
def test_replay_stretches_too(rule):
    model, batch = build(rule, layers=2), gap_batch(50)
    found = []
    for schedule in (Parallel(4), Replay(N, 1, gap_read_segments=4)):
        model.zero_grad()
        sums, _ = schedule.learn(model, batch, lambda sums: sums.tokens + sums.answers)
        probe = schedule.loss(model, batch)
        found.append((sums, probe, [p.grad.clone() for p in model.parameters()]))
    for i in range(2):
        torch.testing.assert_close(found[0][i].answers, found[1][i].answers, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0][0].tokens, found[0][1].tokens, rtol=1e-6, atol=0)
    for one, other in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6 * one.abs().max().item())


def test_a_rule_whose_second_turn_writes_otherwise_is_refused():
    with pytest.raises(InputError, match="gap_read_segments is set, but .* set gap_read_segments=null"):
        gap_loss_of(build("gamma_delta"), gap_batch(9), 4)
    gap_loss_of(build("gamma_delta"), gap_batch(4), 4)  # read in full


def test_a_text_counts_at_least_once():
    held = MemoryState(torch.ones(1, 1, 2, 2), None)
    with pytest.raises(InputError, match="cannot count 0 times; at least once"):
        stretch("deltanet", held, held, torch.eye(2), 0)


def test_a_gap_in_delta_is_estimated_by_the_model():
    model, batch = build("delta"), gap_batch(64)
    _, state = model(batch.tokens[:, : 2 * N])
    read, meant = (cross(model, batch, state, segments) for segments in (None, 8))
    held, found, true = (x.layers[0].memory.matrix for x in (state, meant.end, read.end))
    assert apart(found, true) < 0.2 < apart(held, true)
    identity = torch.eye(8).double().expand_as(read.maps[0])
    assert apart(meant.maps[0], read.maps[0]) < 0.2 < apart(identity, read.maps[0])


def test_training_refuses_it_before_its_first_step(settings, tmp_path):
    with pytest.raises(InputError, match="gap_read_segments is set, but .* set gap_read_segments=null"):
        train(build("gamma_delta").float(), Far(), settings(steps=2, gap_read_segments=4), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@dataclasses.dataclass(frozen=True)
class Far:
    def __getitem__(self, index):
        return gap_batch(200)


@pytest.mark.parametrize("replay", [{}, dict(replay_segments=2)])
def test_the_setting_reaches_the_schedule_and_the_loop(settings, tmp_path, replay):
    chosen = settings(steps=2, gap_read_segments=4, **replay)
    assert _schedule(chosen, N).gap_read_segments == 4
    model, read = build("linear").float(), []
    model.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0].shape[1]))
    train(model, Far(), chosen, tmp_path)
    assert max(read) == 4 * N
    with pytest.raises(InputError, match="gap_read_segments is 0 but must be at least 1"):
        settings(gap_read_segments=0)
