"""The model `tilelli` of lm_eval: scores and continues texts with any language model.

Truncation, special tokens, stop strings and windows equal those of lm_eval's `hf` model, so that both report
the same numbers for the same network.
"""

from __future__ import annotations

import bisect
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tilelli_jax.cli import progress
from tilelli_jax.errors import InputError
from tilelli_jax.generation.decoding import generate_ids
from tilelli_jax.io.json_text import read_json
from tilelli_jax.loading.language import load_with_tokenizer
from tilelli_jax.loading.sources import local_path
from tilelli_jax.models import freeze
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.pretrained.hugging_face import GENERATION
from tilelli_jax.signals.batching import batches, max_time, padded_ids

NUL = 0  # begins and ends the texts of byte-level networks, as in what `tilelli convert --to hf` writes
MAX_NEW = 256  # new tokens if a task sets no limit, as in `hf`
TOP_K = 50  # for sampling, unless a task sets it: the default of transformers
# Generation options → the only supported value.
FIXED_OPTIONS = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1}
# Keys of generation_config.json that change greedy decoding by lm_eval's model `hf` → neutral values.
GREEDY_KEYS: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1), "no_repeat_ngram_size": (None, 0), "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []), "bad_words_ids": (None, []), "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,), "min_length": (None, 0), "min_new_tokens": (None, 0),
    "exponential_decay_length_penalty": (None,)}

Request = tuple[Any, list[int], list[int]]  # key in lm_eval's cache, or None; ids of context, continuation

log = logging.getLogger(__name__)


@register_model("tilelli")
class TilelliLM(TemplateLM):
    """A network, as a model of lm_eval. The arguments are those of `--model_args`.

    Args:
        path: model directory, Hugging Face directory, GGUF file, or id of the Hugging Face hub.
        tokenizer: tokenizer.json, or a directory with it; by default the network's.
        batch_size: number of texts that are computed together. It does not affect the results.
        dtype: type of the computation, float32 or bfloat16.
        max_length: context length in tokens; by default the network's. Longer texts are truncated on
            the left.
        add_bos_token: whether texts begin with the tokenizer's special tokens; by default as its file says.
        prefix_token_id: the token before texts without context; by default BOS, or else the end token.
        enable_thinking: passed to the chat template; by default it is not.
        think_end_token: text after which a continuation's answer begins.
        seed: random seed of sampling.
        device, max_batch_size: ignored; JAX chooses the device.

    Raises:
        InputError: an argument is not valid, or the network cannot be opened.
    """

    def __init__(self, path: str, tokenizer: str = "", *, batch_size: int | str = 1, dtype: str = "float32",
                 max_length: int | None = None, add_bos_token: bool | None = None,
                 prefix_token_id: int | None = None, enable_thinking: bool | None = None,
                 think_end_token: str | None = None, seed: int = 0, device: str | None = None,
                 max_batch_size: int | None = None, **unknown: Any) -> None:
        super().__init__()
        if unknown:
            known = [name for name in inspect.signature(type(self)).parameters if name != "unknown"]
            raise InputError(f"model_args: expected {', '.join(known)}, found {min(unknown)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"batch_size: expected an integer ≥ 1, found {batch_size!r}")
        if dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype: expected float32 or bfloat16, found {dtype!r}")
        self.batch_size, self.path, self.seed = int(batch_size), str(path), int(seed)
        language = load_with_tokenizer(path, tokenizer,
                                       None if dtype == "float32" else ComputeConfig(dtype="bfloat16"))
        self._model, self._language, self._dtype = freeze(language.model), language, dtype
        _warn_of_generation_config(path)
        is_bytes = language.model.is_byte_level
        if tokenizer and is_bytes:
            raise InputError(f"tokenizer: expected none, as {path} is a byte-level network, found "
                             f"{tokenizer}")
        self._bos, self._eos = (NUL, NUL) if is_bytes else (language.bos_id, language.eos_id)
        self._end_ids = (NUL,) if is_bytes else None  # None: those of the configuration
        longest = max_time(language.model)
        self.max_length = language.model.config.max_seq_len if max_length is None else max_length
        if not isinstance(self.max_length, int) or not 1 <= self.max_length <= (longest or self.max_length):
            raise InputError("max_length: expected an integer ≥ 1"
                             + (f" and ≤ {longest}, the network's" if longest else "")
                             + f", found {max_length!r}")
        prefixes = (prefix_token_id, self._bos, self._eos)
        self._prefix = next((token for token in prefixes if token is not None), None)
        vocab_size = language.model.config.vocab_size
        if self._prefix is not None and not 0 <= self._prefix < vocab_size:
            raise InputError(f"prefix_token_id: expected 0 to {vocab_size - 1}, found {self._prefix}")
        self._add_special = add_bos_token
        self._thinking, self._think_end = enable_thinking, think_end_token
        graph, self._params = nnx.split(self._model)

        @jax.jit
        def score(params: Any, ids: jax.Array, targets: jax.Array,
                  spans: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Log-likelihood of the targets in [start, stop) = spans `[batch, 2]`; whether all are greedy."""
            nll, greedy = nnx.merge(graph, params).score(ids, targets)
            position = jnp.arange(ids.shape[1])
            inside = (position >= spans[:, :1]) & (position < spans[:, 1:])
            return -jnp.sum(jnp.where(inside, nll, 0), axis=1), jnp.all(greedy | ~inside, axis=1)
        self._score: Callable[..., Any] = score

    @property
    def eot_token_id(self) -> int | None:
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        if self._prefix is None:
            raise InputError(f"prefix_token_id: expected a token, as {self.path} has no BOS and no end token")
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return self.path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval adds to the configuration in its results."""
        leaves = jax.tree.leaves(self._params)
        return {"model_num_parameters": sum(leaf.size for leaf in leaves), "model_dtype": self._dtype}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text.

        Args:
            add_special_tokens: None: unless the text begins with the prefix token.
        """
        begins = add_special_tokens is None and self._begins_with(string, self._prefix)
        return self._encode(string, False if begins else add_special_tokens)

    def _begins_with(self, text: str, token: int | None) -> bool:
        return token is not None and text.startswith(self._language.tokenizer.decode([token]))

    def _encode(self, text: str, special: bool | None) -> list[int]:
        if special is None:
            special = self._add_special is not False
        try:
            return self._language.tokenizer.encode_with_spans(text, special=special).ids
        except UnicodeEncodeError as error:
            raise InputError(f"a text of the task is not Unicode: {error}") from None

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja template, for lm_eval's results."""
        return self._template().template if chat_template else None

    def _template(self) -> Any:
        if self._language.chat_template is None:
            raise InputError(f"{self.path}: expected a chat template, found none")
        return self._language.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]],
                            add_generation_prompt: bool = True) -> str:
        """Formats a conversation; without `add_generation_prompt` its last message is continued."""
        def formatted(messages: list[dict[str, str]]) -> str:
            return self._template().format_messages(messages, thinking=self._thinking,
                                                    continue_last=not add_generation_prompt)
        others = [message for message in chat_history if message["role"] != "system"]
        try:
            return formatted(chat_history)
        except InputError:
            if len(others) == len(chat_history):
                raise
            log.warning("the chat template does not accept a system message, which is left out")
            return formatted(others)

    def _loglikelihood_tokens(self, requests: Sequence[Request], disable_tqdm: bool = False,
                              **_: Any) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, in nats, and whether greedy decoding produces it."""
        texts, n_truncated = [], 0
        for _text, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise InputError(f"continuation: expected 1 to {self.max_length} tokens (see "
                                 f"max_length), found {len(continuation)}")
            ids = [*context, *continuation]
            n_truncated += len(ids) > self.max_length + 1
            texts.append(ids[-self.max_length - 1:])
        if n_truncated:
            log.warning("%d texts are longer than %d tokens and are truncated on the left", n_truncated,
                        self.max_length)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(texts)
        with progress.shown(len(texts), "scoring", "text", quiet=disable_tqdm) as advance:
            for batch in batches([len(text) - 1 for text in texts], self.batch_size,
                                 limit=max_time(self._model), shrink=True):
                rows = [texts[i] for i in batch.filled]
                spans = [(len(texts[i]) - 1 - len(requests[i][2]), len(texts[i]) - 1) for i in batch.filled]
                sums, greedy = jax.device_get(self._score(
                    self._params, padded_ids([row[:-1] for row in rows], batch.time),
                    padded_ids([row[1:] for row in rows], batch.time), np.array(spans, np.int32)))
                for row, i in enumerate(batch.indices):
                    results[i] = float(sums[row]), bool(greedy[row])
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
                advance(len(batch.indices))
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, in nats, in windows of `max_length` tokens that do not overlap."""
        windows: list[Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1)
            windows += [(None, *make_disjoint_window(window)) for window in rolling]
            owners += [i] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for i, (total, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context until a stop string or an end token."""
        groups: dict[str, list[int]] = {}  # requests with equal options
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        results = [""] * len(requests)
        for members in groups.values():
            options = requests[members[0]].args[1]
            texts = self._continued([requests[i].args[0] for i in members], options, disable_tqdm)
            for i, text in zip(members, texts, strict=True):
                results[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return results

    def _continued(self, contexts: list[str], options: dict[str, Any], disable_tqdm: bool) -> list[str]:
        tokenizer = self._language.tokenizer
        settings: dict[str, Any] = dict(normalize_gen_kwargs(options, MAX_NEW))
        max_new = settings.pop("max_gen_toks")
        stops = [stop for stop in handle_stop_sequences(
            settings.pop("until"), None if self._eos is None else tokenizer.decode([self._eos])) if stop]
        sampling = _sampling(settings)
        if not 1 <= max_new < self.max_length:
            raise InputError(f"max_gen_toks: expected 1 to {self.max_length - 1}, fewer than max_length "
                             f"{self.max_length}, found {max_new}")
        prompts = []
        for text in contexts:
            has_bos = self._begins_with(text, self._bos)
            prompts.append(self._encode(text, False if has_bos else None)[-(self.max_length - max_new):])
        if not all(prompts):
            raise InputError("context: expected at least one token, found an empty text")

        def contains(ids: list[int]) -> bool:
            text = tokenizer.decode(ids)
            return any(stop in text for stop in stops)

        def stop(new: np.ndarray) -> int | None:
            ids = new.tolist()
            if not contains(ids):
                return None
            return bisect.bisect_left(range(len(ids)), True, key=lambda n: contains(ids[:n]))
        with progress.shown(len(prompts), "decoding", "prompt", quiet=disable_tqdm) as advance:
            continued = generate_ids(self._model, prompts, max_new=max_new, end_ids=self._end_ids, stop=stop,
                                     batch_size=self.batch_size, seed=self.seed, advance=advance, **sampling)
        return [postprocess_generated_text(tokenizer.decode(result.ids.tolist(), special=False), stops,
                                           self._think_end) for result in continued]


def _warn_of_generation_config(path: str) -> None:
    """Logs a warning if the network's generation_config.json changes greedy decoding; here it does not."""
    file = local_path(path) / GENERATION
    tree = read_json(file) if file.is_file() else {}
    changed = [f"{key} {tree[key]}" for key, neutral in GREEDY_KEYS.items() if tree.get(key) not in neutral]
    if changed:
        log.warning("%s: %s: not used; lm_eval's model hf uses it", file, ", ".join(changed))


def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """Options of `generate_ids` from a task's generation options, as lm_eval normalises them."""
    do_sample, temperature = settings.pop("do_sample"), float(settings.pop("temperature", 0.0))
    sampling = {"top_k": int(settings.pop("top_k", TOP_K)), "top_p": float(settings.pop("top_p", 1.0))}
    if not do_sample:
        for key in ("min_p", "typical_p"):  # of sampling
            settings.pop(key, None)
    for key, value in settings.items():
        if key not in FIXED_OPTIONS:
            raise InputError("generation_kwargs: expected until, max_gen_toks, do_sample, temperature, top_k "
                             f"and top_p, found {key}")
        if value != FIXED_OPTIONS[key]:
            raise InputError(f"generation_kwargs.{key}: expected {FIXED_OPTIONS[key]}, found {value}")
    if not do_sample:
        return {"temperature": 0.0}
    if temperature <= 0:
        raise InputError(f"generation_kwargs.temperature: expected a number > 0 with do_sample, found "
                         f"{temperature:g}")
    return {"temperature": temperature, **sampling}
