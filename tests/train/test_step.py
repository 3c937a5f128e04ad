import weakref

import pytest
import torch

from infini.train.loss import loss_of
from infini.train.optimizer import build_optimizer
from infini.train.step import Parallel, take_step
from infini.train.window import Window

CPU = torch.device("cpu")


class Watched(torch.optim.SGD):
    """Keeps the gradients that it was given."""

    def step(self):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


@pytest.mark.parametrize(("weight", "of_answers"), [(1.0, 1.0), (0.25, 1.0), (0.0, 1.0), (1.0, 0.0), (0.5, 3.0)])
def test_accumulated_batches_weigh_as_one_large_batch(tiny_model, copy_source, weight, of_answers):
    source = copy_source()
    parts = [source[i] for i in range(5)]
    assert len({part.segments for part in parts}) == 2  # sizes differ: a mean of means would be wrong
    parts[1].answer[:, 3:] = True  # and so do the numbers of answers
    model = tiny_model()
    optimizer = Watched(model.parameters())
    result = take_step(model, optimizer, parts, 1e9, CPU, token_weight=weight, answer_weight=of_answers)

    model.zero_grad()
    losses = [loss_of(model, part.to("cpu")) for part in parts]
    tokens = sum(part.tokens[:, 1:].numel() for part in parts)
    answers = sum(int(part.answer.sum()) for part in parts)
    token_sum, answer_sum = sum(l.tokens for l in losses), sum(l.answers for l in losses)
    (weight * token_sum / tokens + of_answers * answer_sum / answers).backward()

    assert (result.tokens, result.answers) == (tokens, answers)
    torch.testing.assert_close(result.sums.tokens, token_sum.detach())
    torch.testing.assert_close(result.sums.answers, answer_sum.detach())
    assert not result.sums.tokens.requires_grad
    for seen, parameter in zip(optimizer.seen, model.parameters(), strict=True):
        torch.testing.assert_close(seen, parameter.grad)


@pytest.mark.parametrize("clip", [0.25, 1e9])
def test_the_norm_is_told_before_clipping_and_bounded_after(tiny_model, copy_source, clip):
    model = tiny_model()
    optimizer = Watched([{"params": [parameter]} for parameter in model.parameters()])  # of all groups together
    result = take_step(model, optimizer, [copy_source()[0]], clip, CPU)
    after = torch.cat([seen.flatten() for seen in optimizer.seen]).norm().item()
    assert result.gradient_norm > 0.25
    assert after == pytest.approx(min(clip, result.gradient_norm.item()), rel=1e-4)


def test_the_state_behind_a_batch_is_gone_when_the_next_one_is_read(tiny_model, copy_source):
    """It may be a view into the activations of the whole batch."""
    ends = []

    class Held(Parallel):
        def learn(self, model, batch, weigh, state=None):
            assert all(end() is None for end in ends)
            sums, _ = super().learn(model, batch, weigh, state)
            end = torch.zeros(3)
            ends.append(weakref.ref(end))
            return sums, end

    model = tiny_model()
    take_step(model, Watched(model.parameters()), [copy_source()[i] for i in range(3)], 1.0, CPU, Held())
    assert len(ends) == 3


def test_gradients_of_the_step_before_do_not_count(tiny_model, copy_source):
    model = tiny_model()
    optimizer = Watched(model.parameters())
    first = take_step(model, optimizer, [copy_source()[0]], 1e9, CPU)
    again = take_step(model, optimizer, [copy_source()[0]], 1e9, CPU)
    assert torch.equal(first.gradient_norm, again.gradient_norm)


def test_a_step_reads_nothing_back_from_the_device(tiny_model, copy_source, settings):
    # Tensors of the meta device have no values: whatever asks for one raises.
    meta = torch.device("meta")
    model = tiny_model().to(meta)
    optimizer, window = build_optimizer(model, settings()), Window()
    for step in range(2):
        window.add(step, take_step(model, optimizer, [copy_source()[step]] * 2, 1.0, meta))
    with pytest.raises(NotImplementedError):
        window.read()
