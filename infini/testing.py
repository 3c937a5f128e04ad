"""When a fast computation counts as right: three witnesses, one rule, one table of floors.

The oracle is `infini.reference` in fp64. The plain witness computes the same in the dtype under test, written out without
tricks. The fast one may err twice as much as the plain one, plus a floor. Tests and benchmarks use this rule and no other;
nothing in the environment changes it.
"""

import torch
from torch import Tensor

# Smallest error that says anything in a dtype, for numbers of size 1: some ten rounding steps of fp32, two of the 16-bit
# dtypes, and what sums of a few thousand terms lose in fp64. A change here is a change of numerics: it goes into the change log.
FLOORS = {torch.float64: 2e-12, torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def error(found: Tensor, oracle: Tensor) -> float:
    """max |found - oracle|, as a share of the oracle's largest entry if that exceeds 1; infinite where `found` is NaN.

    Args:
        found: any float dtype.
        oracle: fp64, of the same shape: nothing is broadcast.

    Example:
        >>> error(torch.tensor([1.0, float("nan")]), torch.ones(2, dtype=torch.float64))
        inf
    """
    if oracle.dtype != torch.float64:
        raise TypeError(f"the oracle is {oracle.dtype}; it must be float64")
    if found.shape != oracle.shape:
        raise AssertionError(f"shape {list(found.shape)}, the oracle has {list(oracle.shape)}")
    if oracle.numel() == 0:
        return 0.0
    difference = (found.detach().to(oracle.device).double() - oracle.detach()).abs()
    scale = oracle.detach().abs().max().clamp(min=1).item()
    return float(difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max()) / scale


def assert_witnessed(name: str, fast: Tensor, plain: Tensor, oracle: Tensor, dtype: torch.dtype | None = None) -> None:
    """Assert err(fast) <= 2 err(plain) + floor(dtype).

    Args:
        name: what is compared, for the message.
        fast: the result on trial.
        plain: the same, written out plainly in the same dtype.
        oracle: the same in fp64.
        dtype: of the computation; None: that of `fast`.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> assert_witnessed("sum", one * 1.001, one, one, torch.float32)
        Traceback (most recent call last):
        ...
        AssertionError: sum: error 1.00e-03 of the fast one, 0.00e+00 of the plain one; at most 1.00e-06 in torch.float32
    """
    floor = FLOORS[fast.dtype if dtype is None else dtype]
    of_fast, of_plain = error(fast, oracle), error(plain, oracle)
    allowed = 2 * of_plain + floor
    if not of_fast <= allowed < float("inf"):
        raise AssertionError(
            f"{name}: error {of_fast:.2e} of the fast one, {of_plain:.2e} of the plain one; "
            f"at most {allowed:.2e} in {fast.dtype if dtype is None else dtype}"
        )


def assert_equal_to_oracle(name: str, found: Tensor, oracle: Tensor, tolerance: float = 1e-10) -> None:
    """Assert that an fp64 result is the oracle's, up to the order of its sums.

    Example:
        >>> assert_equal_to_oracle("nothing", torch.zeros(2).double(), torch.zeros(2).double())
    """
    if found.dtype != torch.float64:
        raise TypeError(f"{name} is {found.dtype}; only float64 can equal the oracle")
    found_error = error(found, oracle)
    if not found_error <= tolerance:
        raise AssertionError(f"{name}: error {found_error:.2e}, at most {tolerance:.0e}")
