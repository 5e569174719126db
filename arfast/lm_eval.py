"""Models of arfast in EleutherAI's lm-evaluation-harness, under the name `arfast`.

Three ways: `arfast eval CHECKPOINT --tasks NAME`; in Python, `lm_eval.simple_evaluate(model=ArfastLM(path), ...)`; and
the harness's own command line as `python -m arfast.lm_eval --model arfast --model_args pretrained=PATH --tasks NAME`.
Releases of the harness with plugins (after 0.4.13) find the name by themselves where arfast is installed.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import lm_eval.models  # noqa: F401 - the harness registers its own models only while there is no other
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from arfast.data import Tokenizer
from arfast.data.checks import check_integer
from arfast.generate.continuations import score_continuations
from arfast.models import CausalLM

_DEFAULT_BATCH_SIZE = 16
_MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first given counts
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_OPTIONS = ("do_sample", *_SAMPLING, "num_beams", "length_penalty", "early_stopping")


@register_model("arfast")
class ArfastLM(TemplateLM):
    """A CausalLM as the harness sees it: log-likelihoods of continuations and of whole texts, and generation.

    Log-likelihoods are those of the harness's `hf` model; a context that several continuations share, as in multiple
    choice, is read once. Contexts that are too long lose their beginning, with a warning.

    Args:
        pretrained: a model directory, or a CausalLM.
        tokenizer: its tokenizer or the directory of one; None: the model directory's.
        dtype: of the parameters, "float32", "bfloat16", ...; "auto": as stored.
        device: None: cuda where there is one; cuda without one, which the harness's command line asks for: cpu.
        batch_size: rows at a time; "auto" and None: 16.
        max_batch_size: of the harness, for batch sizes that it chooses; not used.
        max_length: tokens that a model sees at once; None: max_position_embeddings, which is the most.
        max_gen_toks: new tokens where a task does not say how many.

    Raises:
        ValueError: `ArfastLM: <argument> must <rule>, got <actual>`.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        *,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
    ):
        super().__init__()
        if isinstance(pretrained, CausalLM):
            if tokenizer is None:
                raise ValueError("ArfastLM: tokenizer must be given with a model that is not read from a directory")
            self.model = pretrained
        else:
            device = torch.device(device or "cuda")
            if device.type == "cuda" and not torch.cuda.is_available():
                device = torch.device("cpu")
            self.model = CausalLM.from_pretrained(pretrained, dtype=_dtype(dtype), device=device)
        source = pretrained if tokenizer is None else tokenizer
        self.tokenizer = source if isinstance(source, Tokenizer) else Tokenizer.load(source)
        self._device = self.model.head_weight.device
        given = _DEFAULT_BATCH_SIZE if batch_size is None or str(batch_size).startswith("auto") else batch_size
        given = int(given) if str(given).isdecimal() else given
        self.batch_size = check_integer("ArfastLM: batch_size", given, 1)
        limit = self.model.config.max_position_embeddings
        self.max_length = limit if max_length is None else check_integer("ArfastLM: max_length", max_length, 2, limit)
        self.max_gen_toks = check_integer("ArfastLM: max_gen_toks", max_gen_toks, 1)

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        first = self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        if first is None:
            raise ValueError("ArfastLM: tokenizer must have a start or an end token, got none")
        return first

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        raise ValueError("ArfastLM: apply_chat_template must be False (there are no chat templates here), got True")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored) -> list[int]:
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **ignored
    ) -> list[tuple[float, bool]]:
        groups: dict[tuple[int, ...], list[int]] = {}  # requests by their context
        contexts = self._cut([context for _, context, _ in requests], [len(request[2]) - 1 for request in requests])
        for place, context in enumerate(contexts):
            groups.setdefault(tuple(context), []).append(place)
        pairs = [[(context, requests[place][2]) for place in places] for context, places in groups.items()]
        scores = score_continuations(self.model, pairs, batch_size=self.batch_size, progress=not disable_tqdm)
        results: list[Any] = [None] * len(requests)
        for places, scored in zip(groups.values(), scores, strict=True):
            for place, score in zip(places, scored, strict=True):
                results[place] = (score.logprob, score.is_greedy)
        for (texts, *_), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows that each see the token before them: the harness's cut."""
        rows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                rows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(rows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string, which is left out. Those with the same arguments go together."""
        results = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(place)
        with tqdm(total=len(requests), disable=disable_tqdm, unit="text") as bar:
            for places in groups.values():
                stops, max_new_tokens, options = generation_arguments(requests[places[0]].args[1], self.max_gen_toks)
                if max_new_tokens >= self.max_length:
                    limit = f"be below the context of {self.max_length} tokens"
                    raise ValueError(f"ArfastLM: max_gen_toks must {limit}, got {max_new_tokens}")
                contexts = [self.tok_encode(requests[place].args[0]) or [self.prefix_token_id] for place in places]
                contexts = self._cut(contexts, [max_new_tokens] * len(contexts))
                order = sorted(range(len(places)), key=lambda i: -len(contexts[i]))
                for begin in range(0, len(order), self.batch_size):
                    batch = order[begin : begin + self.batch_size]
                    texts = self._generate([contexts[i] for i in batch], stops, max_new_tokens, options)
                    for i, text in zip(batch, texts, strict=True):
                        results[places[i]] = text
                        self.cache_hook.add_partial("generate_until", requests[places[i]].args, text)
                    bar.update(len(batch))
        return results

    def _cut(self, contexts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        """The ends of contexts after which `lengths` more tokens are to be fed."""
        cut = []
        for context, length in zip(contexts, lengths, strict=True):
            if length >= self.max_length:
                limit = f"be at most as long as the context of {self.max_length} tokens"
                raise ValueError(f"ArfastLM: continuation must {limit}, got {length + 1}")
            cut.append(context[-(self.max_length - length) :])
        shortened = sum(len(after) < len(before) for after, before in zip(cut, contexts, strict=True))
        if shortened:
            loss = f"{shortened} of {len(cut)} contexts lost their beginning"
            warnings.warn(f"ArfastLM: {loss} to fit {self.max_length} tokens", stacklevel=3)
        return cut

    def _generate(
        self, contexts: list[list[int]], stops: list[str], max_new_tokens: int, options: dict[str, Any]
    ) -> Iterator[str]:
        length = max(map(len, contexts))
        input_ids = torch.tensor([[0] * (length - len(row)) + row for row in contexts], device=self._device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in contexts], device=self._device)
        ends = self._end_tokens(stops)
        collector = _Collector(self.tokenizer, stops, ends)
        if options.get("num_beams", 1) == 1:
            options = options | dict(streamer=collector)
        try:
            tokens = self.model.generate(
                input_ids, max_new_tokens=max_new_tokens, attention_mask=mask, eos_token_id=ends, **options
            )
            rows = tokens[:, length:].tolist()
        except _AllStopped:
            rows = collector.rows
        return (collector.text(row) for row in rows)

    def _end_tokens(self, stops: list[str]) -> list[int]:
        """The model's, the tokenizer's, and special tokens among the stop strings, which a decoded text never shows."""
        ends = self.model.config.eos_token_id
        ends = () if ends is None else (ends,) if isinstance(ends, int) else ends
        special = self.tokenizer.special_token_ids
        own = [self.tokenizer.eos_token_id, *(special.get(stop) for stop in stops)]
        known = [token for token in own if token is not None and token < self.model.config.vocab_size]
        return list(dict.fromkeys([*ends, *known]))


def generation_arguments(arguments: dict[str, Any], max_new_tokens: int) -> tuple[list[str], int, dict[str, Any]]:
    """(stop strings, most new tokens, arguments of `generate`) from a task's generation_kwargs.

    Sampling is on where do_sample says so, or where it says nothing and the temperature is above 0. Arguments that
    `generate` does not have are an error: a result without them would bear the same name.
    """
    arguments = dict(arguments)
    stops = arguments.pop("until", None) or []
    stops = [stops] if isinstance(stops, str) else list(stops)
    lengths = [value for name in _MAX_NEW_TOKENS if (value := arguments.pop(name, None)) is not None]
    max_new_tokens = check_integer("ArfastLM: max_gen_toks", int((lengths or [max_new_tokens])[0]), 1)
    unknown = sorted(set(arguments) - set(_OPTIONS))
    if unknown:
        known = ", ".join(("until", *_MAX_NEW_TOKENS, *_OPTIONS))
        raise ValueError(f"ArfastLM: generation_kwargs must be among {known}, got {', '.join(unknown)}")
    temperature = arguments.setdefault("temperature", 1.0 if arguments.get("do_sample") else 0.0)
    arguments["do_sample"] = temperature > 0.0 and arguments.get("do_sample") is not False
    if not arguments["do_sample"]:
        arguments = {name: value for name, value in arguments.items() if name not in _SAMPLING}
    return stops, max_new_tokens, arguments


class _AllStopped(Exception):
    """Raised out of `generate` when every sequence has come to a stop string or an end token."""


class _Collector:
    """Keeps the new tokens of `generate` as its streamer, and ends it as soon as no sequence goes on."""

    def __init__(self, tokenizer: Tokenizer, stops: list[str], ends: list[int]):
        self.tokenizer, self.stops, self.ends = tokenizer, [stop for stop in stops if stop], set(ends)
        # a token has at least one byte: a stop string that the newest one completes is within so many
        self.tail = 1 + max((len(stop.encode()) for stop in self.stops), default=0)
        self.rows: list[list[int]] = []
        self.open: set[int] | None = None

    def put(self, value: Tensor) -> None:
        if self.open is None:  # the prompts
            self.rows, self.open = [[] for _ in value], set(range(len(value)))
            return
        for row, token in enumerate(value.tolist()):
            if row in self.open:
                self.rows[row].append(token)
                if token in self.ends or self._has_stop(self.rows[row][-self.tail :]):
                    self.open.remove(row)
        if not self.open:
            raise _AllStopped

    def end(self) -> None:
        pass

    def text(self, tokens: list[int]) -> str:
        """What stands before the first end token and the first stop string."""
        end = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        text = self._decode(tokens[:end])
        for stop in self.stops:
            text = text.partition(stop)[0]
        return text

    def _has_stop(self, tokens: list[int]) -> bool:
        text = self._decode(tokens) if self.stops else ""
        return any(stop in text for stop in self.stops)

    def _decode(self, tokens: list[int]) -> str:
        # a model may have more tokens than its tokenizer; those have no text
        return self.tokenizer.decode([token for token in tokens if token < self.tokenizer.vocab_size])


def _dtype(name: str) -> torch.dtype | None:
    dtype = None if name == "auto" else getattr(torch, str(name), name)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"ArfastLM: dtype must be auto or a floating-point type of torch, got {name!r}")
    return dtype


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
