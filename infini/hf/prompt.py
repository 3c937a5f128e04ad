"""Is a prompt one that can be continued, and where is its padding? Every refusal names the remedy."""

import torch
from torch import Tensor

from infini.errors import InputError
from infini.hf.cache import InfiniCache


def new_padding(ids: Tensor, mask: Tensor | None, cache: InfiniCache | None) -> Tensor | None:
    """Padding among new tokens, from transformers' attention mask.

    Args:
        ids: the new tokens `[batch, tokens]`.
        mask: 0 or 1, `[batch, columns + tokens]`: of what the cache has read, then of `ids`; None: no padding.
        cache: what was read before; None: nothing.

    Returns:
        bool `[batch, tokens]`, True at padding; None where there is none.

    Raises:
        InputError: another shape, values other than 0 and 1, or a hole: padding between the tokens of a row.
    """
    if mask is None:
        return None
    columns = 0 if cache is None else cache.columns
    tokens = ids.shape[1]
    if mask.dim() != 2 or mask.shape != (len(ids), columns + tokens):
        read = f" (the cache has read {columns}: give the mask of all, cache.attention_mask(ids))" if columns else ""
        raise InputError(f"attention_mask is {list(mask.shape)}; it must be [{len(ids)}, {columns + tokens}]{read}")
    # One copy to the CPU, of the new columns and the last old one: a step must not look through a whole text.
    edge = min(columns, 1)
    part = mask[:, columns - edge :].cpu()
    real = part == 1
    if not bool((real | (part == 0)).all()):
        raise InputError("attention_mask holds values other than 0 and 1; it must be 1 at tokens and 0 at padding")
    before = torch.zeros(len(ids), dtype=torch.bool)
    if cache is not None and cache.state is not None:
        if cache.state.batch_size != len(ids):
            raise InputError(
                f"the cache has {cache.state.batch_size} rows, the tokens {len(ids)}; "
                "use cache.batch_repeat_interleave(n) or cache.batch_select_indices(rows)"
            )
        before = cache.state.tokens_seen > 0
    resumed = real[:, 1:] & ~real[:, :-1]  # a token right after padding ...
    if bool((resumed & (before[:, None] | (real.cumsum(1)[:, :-1] > 0))).any()):  # ... that has tokens before it
        raise InputError("attention_mask has a hole: padding between the tokens of a row; pad on one side of it only")
    padding = ~real[:, edge:]
    return padding.to(ids.device) if bool(padding.any()) else None


def check_prompt(ids: Tensor | None, mask: Tensor | None, cache: InfiniCache | None, max_new_tokens: int | None) -> None:
    """What `generate` cannot continue.

    Args:
        ids: `[batch, tokens]`, the new tokens, or with them all that the cache has read.
        mask: as `new_padding`.
        cache: an earlier call's.
        max_new_tokens: asked for; None: not said.

    Raises:
        InputError: nothing to continue, nothing to generate, a mask of another shape, padding on the right, or a cache without
            the mask of what it read.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; generate at least 1 (to read only, call the model or a session)")
    if ids is None or ids.dim() != 2 or ids.numel() == 0:
        found = "nothing" if ids is None else list(ids.shape)
        raise InputError(f"the prompt is {found}; give input_ids [batch, tokens] with at least one token")
    if cache is not None and cache.columns:
        _check_continuation(ids, mask, cache)
    elif mask is not None and mask.shape != ids.shape:  # transformers drops a mask of ones before anybody looks at its shape
        raise InputError(f"attention_mask is {list(mask.shape)}; it must be {list(ids.shape)}, like input_ids")
    if mask is not None and not bool(mask[:, -1].all()):
        raise InputError("attention_mask ends with padding; pad prompts on the left (tokenizer.padding_side = 'left')")


def _check_continuation(ids: Tensor, mask: Tensor | None, cache: InfiniCache) -> None:
    read = cache.columns
    if mask is None:
        raise InputError(
            f"the cache has read {read} tokens and there is no attention_mask, so that it is not clear whether input_ids "
            "repeat them; give new tokens alone with attention_mask=cache.attention_mask(input_ids)"
        )
    again = mask.shape == ids.shape and ids.shape[1] > read
    if not again and mask.shape[1] != read + ids.shape[1]:
        raise InputError(
            f"attention_mask is {list(mask.shape)}, input_ids {list(ids.shape)}, and the cache has read {read} tokens; give new "
            "tokens alone with attention_mask=cache.attention_mask(input_ids)"
        )
    if cache.state.batch_size != len(mask):
        return  # the call itself says so
    counted, seen = mask[:, :read].sum(1).long().cpu(), cache.state.tokens_seen
    if not torch.equal(counted, seen):
        raise InputError(
            f"attention_mask counts {counted.tolist()} tokens where the cache has read {seen.tolist()}: it is the mask of "
            "another text; use cache.attention_mask(input_ids)"
        )
