import pytest

from infini.errors import InputError


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("steps", 0, "at least 1"),
        ("accumulation", 0, "at least 1"),
        ("learning_rate", 0.0, "greater than 0"),
        ("clip", -1.0, "greater than 0"),
        ("weight_decay", -0.1, "0 or more"),
        ("min_learning_rate_ratio", 1.5, "between 0 and 1"),
        ("betas", (0.9, 1.0), "below 1"),
        ("precision", "fp16", "bf16 or fp32"),
        ("steps", 2.5, "a whole number"),
        ("seed", 1.0, "a whole number"),
        ("recompute", "no", "true or false"),
        ("clip", None, "a number"),
        ("learning_rate", float("inf"), "greater than 0, and finite"),
        ("token_weight", float("nan"), "a number"),
        ("answer_weight", -1.0, "0 or more"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_limit(settings, name, value, limit):
    with pytest.raises(InputError, match=limit) as caught:
        settings(**{name: value})
    assert name in str(caught.value) and repr(value) in str(caught.value)


def test_a_loss_of_nothing_is_refused(settings):
    assert settings(answer_weight=0.0).token_weight == 1.0
    with pytest.raises(InputError, match="both 0"):
        settings(token_weight=0.0, answer_weight=0.0)


def test_what_does_not_change_the_numbers_is_not_part_of_a_run_s_identity(settings):
    assert settings(log_every=3, workers=1).identity() == settings().identity()
    assert settings(learning_rate=0.5).identity() != settings().identity()
    assert settings(precision="bf16").identity() != settings().identity()
