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

    def forward(self, x: Tensor, before: Tensor, in_document: Tensor | None) -> Tensor:
        """Convolve the new tokens.

        Args:
            x: `[batch, tokens, D]`.
            before: the inputs before them, see `before`.
            in_document: place of each token in its document `[batch, tokens]`; None where no document begins among them.

        Returns:
            y like `x`.
        """
        taps = len(self.weight)
        line, weight, y = torch.cat([before, x], dim=1), self.weight.to(x.dtype), x
        for back in range(1, taps + 1):
            earlier = line[:, taps - back : line.shape[1] - back]
            if in_document is not None:
                earlier = earlier * (in_document >= back).unsqueeze(-1)
            y = torch.addcmul(y, earlier, weight[back - 1])
        return y

    def before(self, x: Tensor, carried: Tensor | None) -> Tensor:
        """The last `taps` inputs before `x` in its dtype, the newest at the end, zeros where the document has fewer; None: no text."""
        if carried is None:
            return x.new_zeros(x.shape[0], len(self.weight), x.shape[2])
        return carried.to(x.dtype)

    def latest(self, x: Tensor, before: Tensor, plan: SegmentPlan) -> Tensor:
        """The last `taps` inputs behind `x`, which came after `before`: what the state carries on."""
        taps = len(self.weight)
        recent = x[:, -taps:] if plan.uniform else x
        return plan.latest(torch.cat([before, recent], dim=1), taps)
