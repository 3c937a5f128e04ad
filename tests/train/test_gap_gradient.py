"""The last segments of a gap with gradient: filler learns what it writes, as often as it counts."""

import dataclasses

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer
from infini.data.batch import Batch, Gap
from infini.errors import InputError
from infini.train import train
from infini.train.long_gap import gap_loss_of
from infini.train.loop import _schedule
from infini.train.reach import reach_of
from infini.train.step import Parallel

N, PERIOD = 4, 8


def build(rule="linear", local="sliding", layers=1):
    torch.manual_seed(3)
    sizes = dict(vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2)
    options = dict(write_gate=True, segment_length=N, update_rule=rule, local_attention=local, initializer_range=0.3)
    return InfiniTransformer(InfiniConfig(**sizes, **options)).double()


def gap_batch(gap, period=PERIOD):
    random = torch.Generator().manual_seed(5)
    tokens = torch.randint(12, (2, 4 * N + 1), generator=random)
    filler = torch.randint(12, (2, period), generator=random, dtype=torch.uint8)
    answer = torch.zeros_like(tokens, dtype=torch.bool)
    answer[:, -3:] = True
    return Batch(tokens, answer, 4, Gap(2, gap, filler))


def learned(model, batch, *segments):
    """Losses and gradients, the gap read as `segments` say."""
    model.zero_grad()
    sums = gap_loss_of(model, batch, *segments)
    sum(sums).backward()
    return torch.stack(tuple(sums)).detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def of_the_whole_text(model, batch):
    """The same losses and their whole gradient, the gap written out and read with the rest."""
    border, length = batch.gap.position * N, batch.gap.segments * N
    text = torch.cat([batch.tokens[:, :border], batch.gap.piece(0, length), batch.tokens[:, border:]], dim=1)
    model.zero_grad()
    logits = model(text[:, :-1])[0]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none")
    own = torch.cat([losses[:, :border], losses[:, border + length :]], dim=1)
    sums = torch.stack([own.sum(), losses[:, -3:].sum()])
    sums.sum().backward()
    return sums.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_alike(found, expected, rtol):
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=rtol * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize("local", ["segment", "sliding"])
@pytest.mark.parametrize(("gap", "read"), [(4, None), (40, 4), (40, 2)])
def test_in_one_layer_repeated_filler_has_its_whole_gradient(local, gap, read):
    """There filler does not depend on the memory: nothing is left out, however short the part that is read."""
    model, batch = build(local=local), gap_batch(gap)
    expected = of_the_whole_text(model, batch)
    found = learned(model, batch, read, read or gap)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)  # fp32 features
    assert_alike(found[1], expected[1], 1e-5)
    plain = learned(model, batch, read)
    gate = "blocks.0.attention.write_gate.weight"
    missing = (plain[1][gate] - expected[1][gate]).norm() / expected[1][gate].norm()
    assert missing > 0.01  # and without it something is


def test_half_of_what_is_read_has_half_of_the_gradient():
    model, batch = build(local="segment"), gap_batch(40)  # local attention does not reach back into the gap
    none, half, whole = (learned(model, batch, 4, segments)[1] for segments in (None, 2, 4))
    assert_alike({name: whole[name] - none[name] for name in none}, {name: 2 * (half[name] - none[name]) for name in none}, 1e-4)


def test_the_schedule_learns_it():
    model, batch = build(), gap_batch(40)
    expected = learned(model, batch, 4, 2)[1]
    model.zero_grad()
    Parallel(4, 2).learn(model, batch, sum)
    assert_alike({name: p.grad for name, p in model.named_parameters()}, expected, 1e-9)


@pytest.mark.parametrize("segments", [1, 3, 100])
def test_the_loss_is_the_same(segments):
    model, batch = build(layers=2), gap_batch(9, period=9 * N)
    plain, found = gap_loss_of(model, batch, 5), gap_loss_of(model, batch, 5, segments)
    torch.testing.assert_close(torch.stack(tuple(found)), torch.stack(tuple(plain)), rtol=1e-6, atol=0)


def test_no_more_is_told_to_have_gradient_than_there_is():
    batch = gap_batch(3)
    assert reach_of(batch, gap_gradient_segments=5) == ((4 + 3) * N, (4 + 3) * N)
    alone = dataclasses.replace(batch, gap=None)
    assert [reach_of(alone, bptt_segments=segments)[0] for segments in (1, 4, 9)] == [N, 4 * N, 4 * N]
    assert reach_of(alone, gap_gradient_segments=5) == (4 * N, 4 * N)


def test_a_call_without_gradient_keeps_none():
    model, batch, modes = build(), gap_batch(9), []
    model.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    with torch.no_grad():
        assert not gap_loss_of(model, batch, 4, 4).tokens.requires_grad
    assert not any(modes)
    modes.clear()
    gap_loss_of(model, batch, 4, 2)
    assert modes == [True, False, True, True]


def test_with_two_layers_it_is_nearer_to_the_gradient_of_the_whole_text():
    model, batch = build(layers=2), gap_batch(40)
    flat = [torch.cat([g.flatten() for g in gradient.values()]) for gradient in (
        of_the_whole_text(model, batch)[1], learned(model, batch, 4)[1], learned(model, batch, 4, 4)[1])]  # fmt: skip
    apart = [(flat[0] - found).norm() / flat[0].norm() for found in flat[1:]]
    assert apart[1] < 0.5 * apart[0]


@pytest.mark.parametrize("rule", ["delta", "deltanet", "gamma_delta"])
def test_rules_that_overwrite_are_refused_before_the_first_step(rule, settings, tmp_path):
    with pytest.raises(InputError, match=f"gap_gradient_segments is set, but in the update rule {rule} .* or use linear"):
        train(build(rule).float(), Far(), settings(steps=2, gap_gradient_segments=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="gap_gradient_segments is set"):
        gap_loss_of(build(rule), gap_batch(4), None, 2)


def test_settings_that_exclude_it_are_refused(settings):
    with pytest.raises(InputError, match="gap_gradient_segments is 5, but no more than gap_read_segments = 4 are read"):
        settings(gap_read_segments=4, gap_gradient_segments=5)
    for name in ("replay_segments", "bptt_segments"):
        with pytest.raises(InputError, match="gap_gradient_segments is 2, but replay_segments and bptt_segments read every gap"):
            settings(gap_gradient_segments=2, **{name: 2})


@dataclasses.dataclass(frozen=True)
class Far:
    def __getitem__(self, index):
        return gap_batch(200)


def test_the_setting_reaches_the_loop_and_the_record(settings, tmp_path):
    chosen = settings(steps=2, gap_read_segments=4, gap_gradient_segments=2)
    assert _schedule(chosen, N) == Parallel(4, 2)
    metrics = train(build().float(), Far(), chosen, tmp_path)
    assert (metrics["gradient_tokens"], metrics["text_tokens"]) == ((4 + 2) * N, (4 + 200) * N)
