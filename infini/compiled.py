"""Parts of a model that `torch.compile` may take: functions of modules and tensors whose sizes differ from call to call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Part:
    """Calls a function of modules and tensors, compiled once asked for.

    A compiled graph holds for one kind of input alone: each branch on a plan or a state, and each size that it takes for fixed, is
    a graph of its own, and some of them are first met in the middle of a training. So what is compiled is small: it sees no plan and
    no state, and of its tensors only sizes differ. Two things still make two graphs: gradients or none, and one row or several.

    Args:
        function: of modules, tensors and None, in any order; the same for all modules of a kind, which share its graphs.
        axes: of each argument, those whose length differs from call to call; `()` for a module.

    Example:
        >>> double = Part(lambda x: 2 * x, (0,))
        >>> double(torch.ones(3)).tolist()
        [2.0, 2.0, 2.0]
    """

    def __init__(self, function: Callable, *axes: tuple[int, ...]):
        self._function, self._axes = function, axes
        self._compiled: Callable | None = None

    def compile(self) -> None:
        """Compile it at its next calls."""
        self._compiled = torch.compile(self._function)

    def __call__(self, *arguments: nn.Module | Tensor | None) -> Any:
        if self._compiled is None:
            return self._function(*arguments)
        return self._compiled(*map(self._prepared, arguments, self._axes))

    def _prepared(self, argument: Any, axes: tuple[int, ...]) -> Any:
        """What the compiled function gets, with the axes marked that differ."""
        if not axes or argument is None:
            return argument
        if not argument.requires_grad and (argument._is_view() or argument.storage_offset()):
            # A graph for a view holds for views of the same kind of tensor alone. What is one here is a small table or state.
            argument = argument.clone(memory_format=torch.contiguous_format)
        # These axes and no others: a compiler that is to guess takes a number of rows for the width that it equals at first.
        torch._dynamo.maybe_mark_dynamic(argument, axes)
        return argument


class TokenPart(Part):
    """A part that takes one module, and treats each token of its tensors `[batch, tokens, ...]` by itself.

    Compiled, it sees them in one row, so that one row or several are the same graph.

    Example:
        >>> total = TokenPart(lambda layer, x, y: layer(x + y), 2)
        >>> total(nn.Identity(), torch.ones(1, 2, 3), torch.ones(1, 2, 3)).shape
        torch.Size([1, 2, 3])
    """

    def __init__(self, function: Callable, tensors: int):
        super().__init__(function, (), *[(0,)] * tensors)

    def __call__(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        found = super().__call__(module, *tensors)
        return found if self._compiled is None else found.unflatten(0, tensors[0].shape[:2])

    def _prepared(self, argument: Any, axes: tuple[int, ...]) -> Any:
        if axes:
            argument = argument.flatten(0, 1)
            torch._dynamo.maybe_mark_dynamic(argument, axes)
        return argument


def compile_parts(module: nn.Module) -> None:
    """Compile every `Part` that is an attribute of the module or of one inside it."""
    for inner in module.modules():
        for part in vars(inner).values():
            if isinstance(part, Part):
                part.compile()
