import logging

import pytest
import torch

from infini.train.loss import loss_of
from infini.train.telemetry import GateWatch, knock_out


def backward(model, batch):
    sum(loss_of(model, batch)).backward()


def test_knock_out_is_the_loss_without_memory_minus_the_loss(tiny_model, copy_source):
    model, batch = tiny_model(), copy_source()[0].to("cpu")
    with torch.no_grad():
        model.beta.fill_(1.5)
        silenced = loss_of(lambda tokens, **options: model(tokens, memory=False, **options), batch)
        whole = loss_of(model, batch)
    found = knock_out(loss_of, model, batch)
    assert found["knockout_token_loss"] == pytest.approx(
        float(silenced.tokens - whole.tokens) / batch.predicted_tokens
    )
    assert found["knockout_answer_loss"] == pytest.approx(float(silenced.answers - whole.answers) / 3)
    assert found["knockout_token_loss"] != 0
    assert found["layers"][0]["memory_weight"] == pytest.approx(torch.full((2,), 1.5).sigmoid().tolist())
    assert found["layers"][1] is None


def test_knock_out_leaves_no_gradient(tiny_model, copy_source):
    model = tiny_model()
    knock_out(loss_of, model, copy_source()[0].to("cpu"))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_healthy_gate_is_not_warned_of(tiny_model, copy_source, caplog):
    model = tiny_model()
    backward(model, copy_source()[0].to("cpu"))
    GateWatch(model).check()
    assert not caplog.records


@pytest.mark.parametrize("logit", [-100.0, 10.0])
def test_a_saturated_gate_is_named_once(tiny_model, copy_source, caplog, logit):
    model = tiny_model()
    with torch.no_grad():
        model.beta[1] = logit
    backward(model, copy_source()[0].to("cpu"))
    watch = GateWatch(model)
    watch.check()
    watch.check()
    messages = [r.getMessage() for r in caplog.records if "saturated (" in r.getMessage()]
    assert len(messages) == 1
    assert messages[0].startswith("gate beta: heads 1 are saturated")


def test_a_gate_rounded_away_by_its_dtype_is_warned_of(tiny_model, copy_source, caplog):
    # fp32 still has a gradient at 10; the weight of bf16 is exactly 1 and has none.
    model = tiny_model()
    with torch.no_grad():
        model.beta.fill_(10.0)
    backward(model, copy_source()[0].to("cpu"))
    assert (model.beta.grad != 0).all()
    model.zero_grad()
    backward(model.bfloat16(), copy_source()[0].to("cpu"))
    with caplog.at_level(logging.WARNING):
        GateWatch(model).check()
    assert "heads 0, 1 received no gradient in torch.bfloat16" in caplog.text


def test_a_frozen_gate_is_warned_of(tiny_model, copy_source, caplog):
    model = tiny_model()
    model.beta.requires_grad_(False)
    backward(model, copy_source()[0].to("cpu"))
    GateWatch(model).check()
    assert "heads 0, 1 received no gradient" in caplog.text
