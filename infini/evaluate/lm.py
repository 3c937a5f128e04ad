"""Models of this library as a model of lm-eval: every text is read once, whole, in memory of a fixed size."""

import inspect
import json
from collections.abc import Iterator, Sequence
from typing import Any

import lm_eval.models  # noqa: F401  # before ours, or the registry would take ours for all there are
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from infini.data.tokenizer import load_tokenizer
from infini.errors import InputError
from infini.evaluate.stream_scores import read, score
from infini.loading import load
from infini.session import StreamingSession

_NUMBERS = {"max_gen_toks": int, "temperature": float, "top_k": int, "top_p": float}
_GENERATION = {"until", "do_sample", *_NUMBERS}


@register_model("infini")
class InfiniLM(TemplateLM):
    """`--model infini --model_args pretrained=FOLDER`: nothing is cut off, whatever its length.

    A context that several continuations share (multiple choice) is read once and each goes on from its state. Texts are scored in one
    pass with the state carried, not in windows. Rows of a batch are independent of each other: padding is left out.

    Args:
        pretrained: a checkpoint folder, the name of a shipped model (None: the first), or a model of the protocol.
        tokenizer: for a model that is given itself: `encode`, `decode`, `vocab_size`; None: the one its configuration names.
        batch_size: texts at once.
        max_batch_size: not used; lm-eval passes it on.
        device: for example "cpu" or "cuda:0"; None: cuda where there is one.
        dtype: of the weights, such as "bfloat16"; None: float32.
        piece: tokens of a text at once; bounds the memory.
        max_gen_toks: longest answer where a task does not say.

    Raises:
        InputError: there is no such checkpoint, device, dtype or argument, or a number is out of its range.
    """

    def __init__(
        self,
        pretrained: Any = None,
        tokenizer: Any = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        piece: int = 4096,
        max_gen_toks: int = 256,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            known = [name for name in inspect.signature(InfiniLM).parameters if name != "unknown"]
            raise InputError(f"model_args has {sorted(unknown)}; this model knows {known}")
        batch_size = batch_size or 1
        for name, value in (("batch_size", batch_size), ("piece", piece), ("max_gen_toks", max_gen_toks)):
            if not str(value).isdecimal():
                raise InputError(f"{name} is {value!r}; give a number")
            if int(value) < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        self.batch_size, self.piece, self.max_gen_toks = int(batch_size), int(piece), int(max_gen_toks)
        if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise InputError(f"dtype is {dtype!r}; use float32, bfloat16 or float16")
        if isinstance(pretrained, torch.nn.Module):
            self.model = pretrained.eval()
        else:
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            self.model = load(pretrained, device, dtype and getattr(torch, dtype))
        self.tokenizer = load_tokenizer(self.model.config) if tokenizer is None else tokenizer
        if self.tokenizer.vocab_size > self.model.config.vocab_size:
            raise InputError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model {self.model.config.vocab_size}; "
                "use the model's own tokenizer"
            )
        self._prefix = list(getattr(self.tokenizer, "prefix_ids", ()))

    @property
    def eot_token_id(self) -> int:
        """What stands before a text: the tokenizer's first token, or a line feed where it has none."""
        return self._prefix[0] if self._prefix else self.tokenizer.encode("\n")[0]

    @property
    def tokenizer_name(self) -> str:
        """Distinguishes requests that lm-eval has cached."""
        return f"{type(self.tokenizer).__name__}-{self.tokenizer.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; the tokenizer's own prefix unless `add_special_tokens` is False."""
        return ([] if add_special_tokens is False else self._prefix) + self.tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """log P of whole texts, each after one prefix token, in one pass."""
        rows = [(None, [self.prefix_token_id], self.tok_encode(request.args[0], False)) for request in requests]
        if not all(text for _, _, text in rows):
            raise InputError("a text to be scored is empty; give texts of at least one token")
        scores = [total for total, _ in self._loglikelihood_tokens(rows, disable_tqdm=disable_tqdm)]
        for request, total in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return scores

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        asked: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, _) in enumerate(requests):
            asked.setdefault(tuple(context), []).append(i)
        results: list[Any] = [None] * len(requests)
        longest_first = sorted(asked, key=lambda context: -len(context) - max(len(requests[i][2]) for i in asked[context]))
        with tqdm(total=len(requests), desc="scoring", disable=disable_tqdm) as bar:
            for contexts in _in_groups(longest_first, self.batch_size):
                state = read(self.model, [context[:-1] for context in contexts], self.piece)
                rows = [(at, i) for at, context in enumerate(contexts) for i in asked[context]]
                for part in _in_groups(rows, self.batch_size):
                    here = state.select(torch.tensor([at for at, _ in part]))
                    before, texts = [requests[i][1][-1] for _, i in part], [requests[i][2] for _, i in part]
                    for (_, i), result in zip(part, score(self.model, here, before, texts, self.piece), strict=True):
                        results[i] = result
                        if requests[i][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
                    bar.update(len(part))
        return results

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of its `until` texts; contexts of any length."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        if not all(prompts):
            raise InputError("a context is empty; give one of at least one token to generate from")
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as bar:
            for rows in alike.values():
                rows.sort(key=lambda i: -len(prompts[i]))
                for part in _in_groups(rows, self.batch_size):
                    options = requests[part[0]].args[1]
                    for i, answer in zip(part, self._continue([prompts[i] for i in part], options), strict=True):
                        answers[i] = answer
                        self.cache_hook.add_partial("generate_until", requests[i].args, answer)
                    bar.update(len(part))
        return answers

    def _continue(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        if unknown := sorted(set(options) - _GENERATION):
            raise InputError(f"generation_kwargs has {unknown}; this model knows {sorted(_GENERATION)}")
        numbers = {name: _number(name, options[name], kind) for name, kind in _NUMBERS.items() if options.get(name) is not None}
        if not isinstance(options.get("do_sample", False), bool):
            raise InputError(f"generation_kwargs has do_sample={options['do_sample']!r}; give true or false")
        until = options.get("until") or []
        stops = [text for text in ([until] if isinstance(until, str) else until) if text]
        sampled = options.get("do_sample", bool(numbers.get("temperature")))
        temperature = (numbers.get("temperature") or 1.0) if sampled else 0.0
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        padding = torch.ones_like(ids, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = torch.tensor(prompt)
            padding[i, : len(prompt)] = False
        session = StreamingSession(self.model, len(prompts), piece=self.piece)
        session.feed(ids, padding if bool(padding.any()) else None)
        written: list[list[int]] = [[] for _ in prompts]
        choice = {"temperature": temperature, "top_k": numbers.get("top_k"), "top_p": numbers.get("top_p")}
        for tokens in session.generate(numbers.get("max_gen_toks", self.max_gen_toks), **choice):
            for row, token in zip(written, tokens.tolist(), strict=True):
                row.append(token)
            texts = list(map(self.tokenizer.decode, written))
            if stops and all(any(stop in text for stop in stops) for text in texts):
                break
        return [_cut(self.tokenizer.decode(row), stops) for row in written]


def _number(name: str, value: Any, kind: type) -> int | float:
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise InputError(f"generation_kwargs has {name}={value!r}; give a number") from None


def _in_groups(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _cut(text: str, stops: list[str]) -> str:
    """The text before the first of the stops.

    >>> _cut("a b. c", [".", " "])
    'a'
    """
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
