"""`InfiniForCausalLM`: an `InfiniTransformer` that transformers, PEFT and lm-eval know how to use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from infini import checkpoint, tokenizer_file
from infini.errors import InputError
from infini.hf.cache import InfiniCache
from infini.hf.config import InfiniHFConfig
from infini.hf.prompt import check_prompt, new_padding
from infini.model import InfiniTransformer

# Backends of local attention by transformers' names.
_BACKENDS = {None: "auto", "sdpa": "sdpa", "eager": "eager", "flash_attention_2": "flash"}
# Arguments that mean nothing here unless they ask for something; the tokenizer of `stop_strings` is handed on by `generate`.
_UNASKED = {"output_attentions", "output_hidden_states", "return_dict", "tokenizer"}


class InfiniForCausalLM(PreTrainedModel, GenerationMixin):
    """`InfiniTransformer` behind the interface of transformers; `self.model` is the transformer itself.

    `from_pretrained` opens the folder that `infini train` and `infini.load` know, and `save_pretrained` writes one. Parameters
    are float32 unless `dtype` says otherwise; memories are float32 in any case. A prompt of any length is read in pieces of
    `piece` tokens, and the cache is an :class:`InfiniCache` of fixed size.

    Attributes:
        piece: most tokens per row of one pass where no gradient is asked for; bounds memory, changes no result.

    Example:
        >>> import torch
        >>> from infini.hf import InfiniForCausalLM, InfiniHFConfig
        >>> model = InfiniForCausalLM(InfiniHFConfig(hidden_size=32, num_hidden_layers=1, segment_length=4)).eval()
        >>> ids = torch.tensor([[5, 6, 7, 8, 9]])
        >>> padded = torch.tensor([[0, 0, 0, 5, 6, 7, 8, 9]])
        >>> alone = model(ids).logits[:, -1]
        >>> beside = model(padded, attention_mask=(padded > 0).long()).logits[:, -1]
        >>> torch.allclose(alone, beside, atol=1e-5)  # padding moves no segment border
        True
    """

    config_class = InfiniHFConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    piece = 4096
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _is_stateful = True  # assisted decoding would have to take tokens back

    def __init__(self, config: InfiniHFConfig):
        asked = getattr(config, "_attn_implementation", None)
        super().__init__(config)
        if asked not in _BACKENDS:
            raise InputError(f"attn_implementation is {asked!r}; choose one of {[name for name in _BACKENDS if name]}")
        self.model = InfiniTransformer(config.infini, _BACKENDS[asked])
        self.gradient_checkpointing = False  # transformers sets it
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `InfiniTransformer` has initialised itself, and a checkpoint without some weight is refused."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the head."""
        self.model.head = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in transformers; the configuration follows."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = self.config.infini
        return embedding

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: InfiniCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Read tokens, and give the logits of those that follow.

        Args:
            input_ids: int `[batch, tokens]`.
            attention_mask: 1 at tokens, 0 at padding on the left or the right, `[batch, tokens]`; with a cache that has read
                something, of what it has read too.
            past_key_values: what an earlier call returned; it is changed to go on.
            labels: int `[batch, tokens]`, -100 where nothing is asked; as in transformers, label i is predicted by token i - 1.
            use_cache: return a cache; None: only out of training.
            logits_to_keep: 0 for all logits, n for those of the last n columns, or the columns themselves, int `[any]`.

        Returns:
            `logits` `[batch, columns, vocab]`, `loss` with labels, `past_key_values` with a cache.

        Raises:
            InputError: tokens, mask or cache do not fit, or something is asked for that this model does not have.
        """
        if unknown := [name for name, value in kwargs.items() if value is not None and name not in (_UNASKED | {"num_items_in_batch"})]:
            raise InputError(f"InfiniForCausalLM does not take {unknown}; it takes input_ids, attention_mask and labels")
        if asked := [name for name in ("output_attentions", "output_hidden_states") if kwargs.get(name)]:
            raise InputError(f"{asked[0]} is True, but there are none to give; model.model(ids, hidden=True) returns the last states")
        if input_ids is None or input_ids.dim() != 2:
            raise InputError("input_ids are missing or not [batch, tokens]; this model reads token ids")
        cache = self._cache(past_key_values, self._wants_cache(use_cache, past_key_values))
        padding = new_padding(input_ids, attention_mask, cache)
        self.model.enable_recompute(self.gradient_checkpointing and self.training)
        states, state = self._read(input_ids, None if cache is None else cache.state, padding, logits_to_keep)
        logits = self.model.head(states)
        loss = None
        if labels is not None:
            counted = {name: kwargs[name] for name in ("num_items_in_batch",) if kwargs.get(name) is not None}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **counted)
        if cache is not None:
            cache.advance(state, input_ids.shape[1])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _read(self, ids: Tensor, state, padding: Tensor | None, keep: int | Tensor):
        """Hidden states of the columns to keep `[batch, columns, hidden]`, and the state after all."""
        tokens = ids.shape[1]
        if isinstance(keep, Tensor):
            if keep.dim() != 1 or keep.dtype not in (torch.int32, torch.int64) or not bool(((keep >= -tokens) & (keep < tokens)).all()):
                raise InputError(f"logits_to_keep is {keep}; columns are integers from {-tokens} to {tokens - 1}, in one axis")
            wanted = keep.to(ids.device) % tokens
            first = int(wanted.min()) if len(wanted) else tokens - 1
        else:
            if not isinstance(keep, int) or keep < 0:
                raise InputError(f"logits_to_keep is {keep!r}; give 0 for all columns, how many of the last, or a tensor of columns")
            wanted, first = None, max(0, tokens - keep) if keep else 0
        # A backward pass needs everything at once; what has no gradient needs a piece at a time.
        piece = max(1, tokens if torch.is_grad_enabled() else self.piece)
        kept = []
        for start in range(0, max(tokens, 1), piece):
            part = slice(start, min(start + piece, tokens))
            mask = None if padding is None or not bool(padding[:, part].any()) else padding[:, part]
            silent = part.stop <= first
            states, state = self.model(ids[:, part], state, padding=mask, keep="none" if silent else "all", hidden=True)
            if not silent:
                kept.append(states[:, max(0, first - start) :])
        states = torch.cat(kept, dim=1) if len(kept) != 1 else kept[0]
        return (states if wanted is None else states[:, wanted - first]), state

    def _wants_cache(self, use_cache: bool | None, cache: Any) -> bool:
        return use_cache if use_cache is not None else cache is not None or not self.training

    def _cache(self, cache: Any, wanted: bool) -> InfiniCache | None:
        if cache is None:
            return InfiniCache() if wanted else None
        if not isinstance(cache, InfiniCache):
            raise InputError(
                f"past_key_values is a {type(cache).__name__}; give the InfiniCache that an earlier call returned, or "
                "InfiniCache(state)"
            )
        return cache if wanted or cache.columns else None

    def generate(self, inputs: Tensor | None = None, generation_config=None, **kwargs: Any):
        """As `GenerationMixin.generate`, for prompts of any length.

        With a cache that has read something, give the new tokens alone and `attention_mask=cache.attention_mask(new)`; for beams
        and several answers its rows are repeated here, unless that is done already.

        Raises:
            InputError: no prompt, nothing to generate, padding on the right or in the middle, a cache without its mask, or
                a kind of cache or of decoding that a fixed state does not have.
        """
        config = generation_config or self.generation_config
        names = ("max_new_tokens", "use_cache", "cache_implementation", "num_beams", "num_return_sequences")
        asked = {name: kwargs.get(name, getattr(config, name, None)) for name in names}
        if asked["cache_implementation"] is not None:
            raise InputError(f"cache_implementation is {asked['cache_implementation']!r}; this model has an InfiniCache only")
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        cache = self._cache(kwargs.get("past_key_values"), asked["use_cache"] is not False)
        check_prompt(ids, kwargs.get("attention_mask"), cache, asked["max_new_tokens"])
        if cache is not None:
            kwargs["past_key_values"] = cache
            if cache.state is not None and cache.state.batch_size == len(ids):
                cache.batch_repeat_interleave(max(asked["num_beams"] or 1, asked["num_return_sequences"] or 1))
        return super().generate(inputs, generation_config, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
        """As in transformers; weights have the names that `infini.load` knows."""
        if not getattr(self, "_hf_peft_config_loaded", False):  # adapters alone keep their names
            state_dict = self.state_dict() if state_dict is None else state_dict
            state_dict = {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
            if self.config.tie_word_embeddings:
                state_dict.pop("head.weight", None)
            if os.path.dirname(self.config.tokenizer):  # a path, not the name of a file in a folder that is not known
                Path(save_directory).mkdir(parents=True, exist_ok=True)
                tokenizer_file.store(Path(save_directory), self.config.tokenizer)
        super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        """As in torch; also takes the names of a checkpoint folder, as `Trainer` reads them to go on."""
        own = {name if name.startswith("model.") else f"model.{name}": tensor for name, tensor in state_dict.items()}
        if self.config.tie_word_embeddings and "model.embedding.weight" in own:
            own.setdefault("model.head.weight", own["model.embedding.weight"])
        return super().load_state_dict(own, strict, assign)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Self:
        """As in transformers, but parameters are float32 unless `dtype` is given, and every weight must be there and finite.

        Raises:
            InputError: weights are missing, left over or not finite.
        """
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32
        where = pretrained_model_name_or_path
        model, found = super().from_pretrained(where, *args, output_loading_info=True, **kwargs)
        missing, extra = (sorted(found.get(name) or ()) for name in ("missing_keys", "unexpected_keys"))
        if missing or extra:
            raise InputError(f"{where} belongs to another configuration: missing {missing[:3]}, unexpected {extra[:3]}")
        checkpoint.require_finite(where, model.state_dict())
        if os.path.isdir(where) and model.config.tokenizer == tokenizer_file.FILE:  # in that folder, not in the current one
            model.config.tokenizer = checkpoint.require_tokenizer(where, model.config.tokenizer)
            model.model.config = model.config.infini
        return (model, found) if output_loading_info else model
