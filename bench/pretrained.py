"""GPT-NeoX compared with transformers, and conversion: python -m bench.pretrained [--rounds N].

Uses the same random network (12 layers × 512) here and in transformers, with eager and with PyTorch's fused
attention. Times the forward pass of a batch of 8 × 256 tokens, and greedy cached decoding of 8 prompts of 64
tokens. The time per step is the difference between decoding 96 and 32 tokens, divided by 64, which excludes
the prompt and the fixed cost of a call. Then times `tilelli convert` on a directory of such a network, in
GB/s, compared with a plain copy of its file. On a GPU both sides run in bfloat16.
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
    tee,
    torch_synchronize,
)
from tilelli_jax.cli.tables import table
from tilelli_jax.generation.decoding import generate_ids
from tilelli_jax.loading.store import build
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.models.gpt_neox import FlaxGPTNeoXForCausalLM, GPTNeoXConfig

CONFIG = GPTNeoXConfig(vocab_size=50304, d_model=512, n_layers=12, n_heads=8, d_hidden=2048)
BATCH, TIME = 8, 256
PROMPT, FEW, MANY = 64, 32, 96
COPIES = 16  # how many times more layers the converted network has


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def our_forward(model: Any, ids: np.ndarray) -> Candidate:
    graph, params = nnx.split(model)
    forward, inputs = jax.jit(lambda params, ids: nnx.merge(graph, params)(ids)), jnp.asarray(ids)
    return lambda: forward(params, inputs).block_until_ready()


def transformers_forward(model: Any, ids: np.ndarray) -> Candidate:
    import torch
    (inputs,) = on_torch_device(torch.from_numpy(ids))

    def run() -> None:
        with torch.inference_mode():
            model(inputs, use_cache=False)
        torch_synchronize()
    return run


def our_decoding(model: Any, ids: np.ndarray, new: int) -> Candidate:
    return lambda: generate_ids(model, list(ids), max_new=new, temperature=0.0, end_ids=())


def transformers_decoding(model: Any, ids: np.ndarray, new: int) -> Candidate:
    import torch
    (inputs,) = on_torch_device(torch.from_numpy(ids))

    def run() -> None:
        with torch.inference_mode():
            model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new,
                           do_sample=False, pad_token_id=0)
        torch_synchronize()
    return run


def load_transformers(path: Path, attention: str) -> Any:
    import torch
    import transformers
    transformers.logging.disable_progress_bar()
    (model,) = on_torch_device(transformers.GPTNeoXForCausalLM.from_pretrained(
        path, attn_implementation=attention, dtype=torch.bfloat16 if on_gpu() else torch.float32).eval())
    model.generation_config.eos_token_id = None  # no row stops early
    return model


def compare(rounds: int, print_line: Callable[[str], None], directory: Path) -> None:
    import transformers
    compute = ComputeConfig(dtype="bfloat16" if on_gpu() else "float32")
    model = build(CONFIG, 0, compute)
    model.save_pretrained(directory / "network", dtype=compute.dtype)
    if on_gpu():
        model = FlaxGPTNeoXForCausalLM.from_pretrained(directory / "network", compute, param_dtype="bfloat16")
    rng = np.random.default_rng(0)
    ids = rng.integers(0, CONFIG.vocab_size, (BATCH, TIME))
    prompts = ids[:, :PROMPT]
    print_line(f"{machine()}, transformers {transformers.__version__}; GPT-NeoX {CONFIG.n_layers} × "
               f"{CONFIG.d_model}, {compute.dtype}, {rounds} alternating rounds")
    networks = {name: load_transformers(directory / "network", name) for name in ("eager", "sdpa")}
    seconds = in_turn({"ours": our_forward(model, ids),
                       **{name: transformers_forward(networks[name], ids) for name in networks}}, rounds)
    rows: list[tuple[str, ...]] = [(f"forward, {BATCH} × {TIME}", "ms", "ours / variant")]
    rows += [(label(name), milliseconds(seconds[name]), f"{ratio(seconds['ours'], seconds[name]):.2f}")
             for name in seconds]
    print_line(table(rows))
    seconds = in_turn({
        "ours": our_decoding(model, prompts, FEW), "ours, many": our_decoding(model, prompts, MANY),
        **{f"{name}{suffix}": transformers_decoding(networks[name], prompts, new) for name in networks
           for suffix, new in (("", FEW), (", many", MANY))}}, rounds)
    per_step = {name: [(many - few) / (MANY - FEW)
                       for few, many in zip(seconds[name], seconds[f"{name}, many"], strict=True)]
                for name in ("ours", *networks)}
    rows = [(f"greedy decoding, batch {BATCH}", "ms/step", "tokens/s", "tokens/s, ours / variant")]
    rows += [(label(name), milliseconds(per_step[name]),
              f"{BATCH / statistics.median(per_step[name]):,.0f}",
              f"{ratio(per_step[name], per_step['ours']):.2f}") for name in per_step]
    print_line(table(rows))


def convert(rounds: int, print_line: Callable[[str], None], directory: Path) -> None:
    """Prints the speed of converting to a model directory, of converting back, and of copying the file."""
    from tilelli_jax.convert.command import main as convert_command
    model = build(GPTNeoXConfig(vocab_size=CONFIG.vocab_size, d_model=CONFIG.d_model,
                                n_layers=CONFIG.n_layers * COPIES, n_heads=CONFIG.n_heads,
                                d_hidden=CONFIG.d_hidden), 0)
    model.save_pretrained(directory / "large")
    size = (directory / "large" / "model.safetensors").stat().st_size
    del model

    def timed(run: Callable[[], object], output: Path) -> float:
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
        if output.is_dir() and output.name == "back":
            shutil.rmtree(output)
        return seconds

    def conversion(*command_line: str) -> Callable[[], object]:
        def run() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                assert convert_command([argument if argument.startswith("--") or argument == "torch" else
                                        str(directory / argument) for argument in command_line]) == 0
        return run

    times: dict[str, list[float]] = {"copy": [], "convert": [], "convert back": []}
    for _ in range(rounds):
        shutil.rmtree(directory / "ours", ignore_errors=True)
        times["copy"].append(timed(
            lambda: shutil.copy(directory / "large/model.safetensors", directory / "copy"),
            directory / "copy"))
        (directory / "copy").unlink()
        times["convert"].append(timed(conversion("large", "ours"), directory / "ours"))
        times["convert back"].append(timed(conversion("ours", "back", "--to", "torch"), directory / "back"))
    rows = [(f"{size / 1e9:.2f} GB, float32", "s", "GB/s", "× copy time")]
    rows += [(name, f"{statistics.median(seconds):.2f}", f"{size / 1e9 / statistics.median(seconds):.2f}",
              f"{ratio(seconds, times['copy']):.1f}") for name, seconds in times.items()]
    print_line(table(rows))


def label(name: str) -> str:
    return {"ours": "ours", "eager": "transformers, eager", "sdpa": "transformers, fused attention"}[name]


def main() -> None:
    options = arguments(__doc__, rounds=7).parse_args()
    with tee(options.out) as print_line, tempfile.TemporaryDirectory() as directory:
        compare(options.rounds, print_line, Path(directory))
        convert(max(3, options.rounds // 2), print_line, Path(directory))


if __name__ == "__main__":
    main()
