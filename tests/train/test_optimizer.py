import pytest
import torch

from infini.train.optimizer import build_optimizer, learning_rate_at, set_learning_rate


def test_each_group_has_its_rate_and_only_matrices_decay(tiny_model, settings):
    model = tiny_model()
    optimizer = build_optimizer(model, settings(memory_learning_rate_scale=7.0, weight_decay=0.2, betas=(0.5, 0.6)))
    assert all(group["betas"] == (0.5, 0.6) for group in optimizer.param_groups)
    set_learning_rate(optimizer, 0.01)
    found = {
        name: (group["lr"], group["weight_decay"])
        for name, parameter in model.named_parameters()
        for group in optimizer.param_groups
        if any(parameter is p for p in group["params"])
    }
    assert found == {
        "out.weight": (0.01, 0.2),
        "embedding.weight": (0.01, 0.0),
        "out.bias": (0.01, 0.0),
        "beta": (pytest.approx(0.07), 0.0),
    }


def test_without_a_gradient_matrices_shrink_and_gates_stay(tiny_model, settings):
    model = tiny_model()
    with torch.no_grad():
        model.beta.fill_(2.0)
    before = model.out.weight.clone()
    optimizer = build_optimizer(model, settings(weight_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.out.weight, before * 0.95)
    assert model.beta.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("change", ["left out", "twice", "unknown"])
def test_groups_must_hold_every_parameter_once(tiny_model, settings, change):
    model = tiny_model()
    groups = model.parameter_groups()
    groups["memory"] = {"left out": [], "twice": ["beta", "beta"], "unknown": ["beta", "gamma"]}[change]
    model.parameter_groups = lambda: groups
    with pytest.raises(ValueError, match="gamma" if change == "unknown" else "beta"):
        build_optimizer(model, settings())


def test_a_model_without_memory_parameters_trains(tiny_model, settings):
    model = tiny_model()
    model.beta.requires_grad_(False)
    groups = model.parameter_groups() | {"memory": []}
    model.parameter_groups = lambda: groups
    assert {group["name"] for group in build_optimizer(model, settings()).param_groups} == {
        "decay",
        "no_decay",
    }


def test_the_rate_rises_to_the_peak_and_falls_to_its_floor(settings):
    s = settings(steps=1000, warmup_steps=100, learning_rate=2.0, min_learning_rate_ratio=0.1)
    rates = [learning_rate_at(step, s) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == rates[99] == rates[100] == pytest.approx(2.0)
    assert rates[550] == pytest.approx(1.1)
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(0.2, rel=1e-3)
