"""The rule that judges the others."""

import pytest
import torch

from infini.testing import FLOORS, assert_equal_to_oracle, assert_witnessed, error

f64 = torch.float64


def test_error_is_absolute_below_one_and_a_share_above():
    assert error(torch.tensor([0.5, 0.2]), torch.tensor([0.5, 0.1], dtype=f64)) == pytest.approx(0.1)
    assert error(torch.tensor([50.0, 20.0]), torch.tensor([50.0, 10.0], dtype=f64)) == pytest.approx(0.2)


def test_nothing_is_broadcast_and_nan_is_never_right():
    with pytest.raises(AssertionError, match=r"shape \[1\], the oracle has \[2\]"):
        error(torch.ones(1), torch.ones(2, dtype=f64))
    nan = torch.tensor([float("nan")])
    with pytest.raises(AssertionError, match="inf"):
        assert_witnessed("x", nan, nan, torch.ones(1, dtype=f64))
    with pytest.raises(TypeError, match="must be float64"):
        error(torch.ones(1), torch.ones(1))


@pytest.mark.parametrize("dtype", FLOORS)
def test_the_fast_one_may_err_twice_as_much_as_the_plain_one(dtype):
    oracle, floor = torch.ones(1, dtype=f64), FLOORS[dtype]
    plain = oracle + 10 * floor
    assert_witnessed("x", oracle + 20.9 * floor, plain, oracle, dtype)
    with pytest.raises(AssertionError, match="x: error"):
        assert_witnessed("x", oracle + 21.1 * floor, plain, oracle, dtype)


def test_only_fp64_equals_the_oracle():
    one = torch.ones(1, dtype=f64)
    assert_equal_to_oracle("x", one + 9e-11, one)
    with pytest.raises(AssertionError, match="error 2.00e-10"):
        assert_equal_to_oracle("x", one + 2e-10, one)
    with pytest.raises(TypeError, match="x is torch.float32"):
        assert_equal_to_oracle("x", one.float(), one)
