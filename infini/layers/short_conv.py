"""A causal convolution over the last few tokens: what a token is made into depends on the tokens just before it."""

import torch
from torch import Tensor, nn

from infini.segments import SegmentPlan


class ShortConv(nn.Module):
    """y_t = x_t + sum_i w_i * x_{t - i}, i = 1 .. `taps`, a number of its own for each channel and step back.

    With it the key of a digit holds the letters before it in the first layer already. It is the short convolution of
    today's linear attentions (H3, arXiv 2212.14052; Based, arXiv 2402.18668; Gated DeltaNet, arXiv 2412.06464), here once
    for queries, keys, values and write gate together, and no convolution at the start of training. It reaches over the
    borders of segments and never over those of documents.

    Args:
        channels: D.
        taps: how many tokens back.

    Parameters: weight `[taps, D]`, zeros at the start.
    """

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(taps, channels))

    def forward(self, x: Tensor, before: Tensor | None, plan: SegmentPlan) -> tuple[Tensor, Tensor]:
        """Convolve the new tokens.

        Args:
            x: `[batch, tokens, D]`.
            before: the last `taps` inputs before them, the newest at the end, zeros where the document has fewer; None: no text.
            plan: the places of the tokens.

        Returns:
            y like `x`, and the last `taps` inputs now.
        """
        taps = len(self.weight)
        before = x.new_zeros(x.shape[0], taps, x.shape[2]) if before is None else before.to(x.dtype)
        line, weight, y = torch.cat([before, x], dim=1), self.weight.to(x.dtype), x
        for back in range(1, taps + 1):
            earlier = line[:, taps - back : line.shape[1] - back]
            if plan.in_document is not None:
                earlier = earlier * (plan.in_document >= back).unsqueeze(-1)
            y = y + weight[back - 1] * earlier
        return y, plan.latest(line, taps)
