"""GPT-NeoX against transformers, and conversion: python -m bench.pretrained [--rounds N].

The same random network (12 layers × 512 by default) here and in transformers (eager attention and
PyTorch's fused one): the forward pass of a batch of 8 × 256, and greedy cached decoding of 8 prompts
of 64 tokens; a token's time is the difference between 96 and 32 new ones, so that prompt and calls'
fixed price are not in it. Then `tilelli convert` of that network's directory, in GB/s, beside a
plain copy of its file. With a GPU both sides are in bfloat16 there.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.measure import (
    Candidate,
    arguments,
    in_turn,
    machine,
    milliseconds,
    on_torch_device,
    ratio,
    told,
    torch_wait,
)
from tilelli_jax.decoding import generate_ids
from tilelli_jax.models.decoder import ComputeConfig
from tilelli_jax.models.gpt_neox import FlaxGPTNeoXForCausalLM, GPTNeoXConfig
from tilelli_jax.store import build
from tilelli_jax.tables import table

CONFIG = GPTNeoXConfig(vocab_size=50304, d_model=512, n_layers=12, n_heads=8, d_hidden=2048)
BATCH, TIME = 8, 256
PROMPT, FEW, MANY = 64, 32, 96
COPIES = 16  # of the network's tensors, in the directory that is converted


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def ours_forward(model: Any, ids: np.ndarray) -> Candidate:
    graph, params = nnx.split(model)
    forward, given = jax.jit(lambda params, ids: nnx.merge(graph, params)(ids)), jnp.asarray(ids)
    return lambda: forward(params, given).block_until_ready()


def theirs_forward(model: Any, ids: np.ndarray) -> Candidate:
    import torch
    (given,) = on_torch_device(torch.from_numpy(ids))

    def run() -> None:
        with torch.inference_mode():
            model(given, use_cache=False)
        torch_wait()
    return run


def ours_decoding(model: Any, ids: np.ndarray, new: int) -> Candidate:
    return lambda: generate_ids(model, list(ids), max_new=new, temperature=0.0, end_ids=())


def theirs_decoding(model: Any, ids: np.ndarray, new: int) -> Candidate:
    import torch
    (given,) = on_torch_device(torch.from_numpy(ids))

    def run() -> None:
        with torch.inference_mode():
            model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False,
                           pad_token_id=0)
        torch_wait()
    return run


def load_theirs(path: Path, attention: str) -> Any:
    import torch
    import transformers
    transformers.logging.disable_progress_bar()
    (model,) = on_torch_device(transformers.GPTNeoXForCausalLM.from_pretrained(
        path, attn_implementation=attention, dtype=torch.bfloat16 if on_gpu() else torch.float32).eval())
    model.generation_config.eos_token_id = None  # every row goes on to the end
    return model


def compare(rounds: int, tell: Callable[[str], None], folder: Path) -> None:
    import transformers
    compute = ComputeConfig(dtype="bfloat16" if on_gpu() else "float32")
    model = build(CONFIG, 0, compute)
    model.save_pretrained(folder / "network", dtype=compute.dtype)
    if on_gpu():
        model = FlaxGPTNeoXForCausalLM.from_pretrained(folder / "network", compute, param_dtype="bfloat16")
    rng = np.random.default_rng(0)
    ids = rng.integers(0, CONFIG.vocab_size, (BATCH, TIME))
    prompts = ids[:, :PROMPT]
    tell(f"{machine()}, transformers {transformers.__version__}; GPT-NeoX {CONFIG.n_layers} × "
         f"{CONFIG.d_model}, {compute.dtype}, {rounds} rounds in turn")
    theirs = {name: load_theirs(folder / "network", name) for name in ("eager", "sdpa")}
    seconds = in_turn({"ours": ours_forward(model, ids),
                       **{name: theirs_forward(theirs[name], ids) for name in theirs}}, rounds)
    rows: list[tuple[str, ...]] = [(f"forward, {BATCH} × {TIME}", "ms", "ours / this one")]
    rows += [(_name(who), milliseconds(seconds[who]), f"{ratio(seconds['ours'], seconds[who]):.2f}")
             for who in seconds]
    tell(table(rows))
    seconds = in_turn({
        "ours": ours_decoding(model, prompts, FEW), "ours, many": ours_decoding(model, prompts, MANY),
        **{f"{name}{end}": theirs_decoding(theirs[name], prompts, new) for name in theirs
           for end, new in (("", FEW), (", many", MANY))}}, rounds)
    each = {who: [(many - few) / (MANY - FEW) for few, many in zip(seconds[who], seconds[f"{who}, many"],
                                                                 strict=True)] for who in ("ours", *theirs)}
    rows = [(f"greedy decoding, batch {BATCH}", "ms a step", "tokens/s", "ours × this one's tokens/s")]
    rows += [(_name(who), milliseconds(each[who]), f"{BATCH / statistics.median(each[who]):,.0f}",
              f"{ratio(each[who], each['ours']):.2f}") for who in each]
    tell(table(rows))


def convert(rounds: int, tell: Callable[[str], None], folder: Path) -> None:
    """GB/s of conversions, to our directory and back, and of copying the file."""
    from tilelli_jax.convert.command import main as command
    model = build(GPTNeoXConfig(vocab_size=CONFIG.vocab_size, d_model=CONFIG.d_model,
                                n_layers=CONFIG.n_layers * COPIES, n_heads=CONFIG.n_heads,
                                d_hidden=CONFIG.d_hidden), 0)
    model.save_pretrained(folder / "large")
    size = (folder / "large" / "model.safetensors").stat().st_size
    del model

    def timed(run: Callable[[], object], made: Path) -> float:
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
        if made.is_dir() and made.name == "back":
            shutil.rmtree(made)
        return seconds

    def command_of(*words: str) -> Callable[[], object]:
        def run() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                assert command([str(folder / word) if not word.startswith("--") and word != "torch" else word
                                for word in words]) == 0
        return run

    found: dict[str, list[float]] = {"copy": [], "convert": [], "convert back": []}
    for _ in range(rounds):
        shutil.rmtree(folder / "ours", ignore_errors=True)
        found["copy"].append(timed(lambda: shutil.copy(folder / "large/model.safetensors", folder / "copy"),
                                   folder / "copy"))
        (folder / "copy").unlink()
        found["convert"].append(timed(command_of("large", "ours"), folder / "ours"))
        found["convert back"].append(timed(command_of("ours", "back", "--to", "torch"), folder / "back"))
    rows = [(f"{size / 1e9:.2f} GB, float32", "s", "GB/s", "× a copy's time")]
    rows += [(who, f"{statistics.median(seconds):.2f}", f"{size / 1e9 / statistics.median(seconds):.2f}",
              f"{ratio(seconds, found['copy']):.1f}") for who, seconds in found.items()]
    tell(table(rows))


def _name(who: str) -> str:
    return {"ours": "ours", "eager": "transformers, eager", "sdpa": "transformers, fused attention"}[who]


def main() -> None:
    options = arguments(__doc__, rounds=7).parse_args()
    with told(options.out) as tell, tempfile.TemporaryDirectory() as folder:
        compare(options.rounds, tell, Path(folder))
        convert(max(3, options.rounds // 2), tell, Path(folder))


if __name__ == "__main__":
    main()
