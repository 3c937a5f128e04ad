"""Results by name against the same in fp64, each measured by its own size."""

import torch
from torch import Tensor

from infini.testing import assert_witnessed


def assert_agree(fast: dict[str, Tensor], plain: dict[str, Tensor], oracle: dict[str, Tensor]) -> None:
    """Assert the rule of `infini.testing` for every result, as shares of the oracle's largest entry: gradients may all be small.

    Args:
        fast: on trial, in 16 bits or with sums of products of such.
        plain: the same, written out plainly in bf16.
        oracle: the same in fp64.

    Raises:
        AssertionError: numbers differ.

    Example:
        >>> import torch
        >>> oracle = {"x": torch.tensor([1e-5]).double()}
        >>> assert_agree({"x": torch.tensor([1.01e-5])}, oracle, oracle)
        >>> assert_agree({"x": torch.tensor([1.02e-5])}, oracle, oracle)
        Traceback (most recent call last):
        ...
        AssertionError: x: error 2.00e-02 of the fast one, 0.00e+00 of the plain one; at most 1.60e-02 in torch.bfloat16
    """
    for name, true in oracle.items():
        size = true.abs().max()
        size = torch.where(size > 0, size, 1)
        assert_witnessed(name, fast[name].double() / size, plain[name].double() / size, true / size, torch.bfloat16)
