"""nanoGPT's CPU "baby" setting: python -m bench.nanogpt_cpu TEXT [--seeds 0 1 2].

TEXT is tiny Shakespeare or any text file; the last tenth is the validation split. Each model runs in a
separate process, which is timed from start to end, including imports and compilation. The reported loss is
that on the whole validation split after training, in nats/byte:

    pytorch     nanoGPT's network and settings in eager PyTorch, 2000 updates
    vanilla     the same network and settings in this library
    lite        the Lite block with equal parameters and updates
    fast        the vanilla network with this library's optimiser and schedule
    fast-lite   the Lite block with this library's optimiser and schedule
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.measure import arguments, machine, ratio, tee
from tilelli_jax.cli.tables import table

CONFIGS = {"vanilla": "baby-vanilla", "lite": "baby-lite", "fast": "baby-fast", "fast-lite": "baby-fast-lite"}
STEPS, BATCH, TIME = 2000, 12, 64


def run_config(name: str, text: str, seed: int, directory: str) -> tuple[float, float, int]:
    """Trains a configuration; returns seconds, final validation loss (nats/byte) and parameters."""
    run_dir = Path(directory, f"{name}-{seed}")
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tilelli_jax.train", "--config", f"configs/{CONFIGS[name]}.yaml",
                    f"data.source={text}", f"run_dir={run_dir}", f"seed={seed}",
                    f"data.shuffle_seed={seed}"], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    summary = json.loads((run_dir / "summary.json").read_text())
    return seconds, summary["final_valid_loss"], summary["parameters"]


def run_pytorch(text: str, seed: int) -> tuple[float, float, int]:
    """Trains nanoGPT in PyTorch; returns seconds, final validation loss (nats/byte) and parameters."""
    begin = time.perf_counter()
    process = subprocess.run([sys.executable, "-m", "bench.nanogpt_cpu", text, "--pytorch-seed", str(seed)],
                             check=True, capture_output=True, text=True)
    loss, parameters = process.stdout.split()[-2:]
    return time.perf_counter() - begin, float(loss), int(parameters)


def pytorch(path: str, seed: int) -> None:
    """Trains as nanoGPT does: N(0, 0.02) weights, AdamW 1e-3 → 1e-4, betas 0.9/0.99, decay 0.1."""
    import math

    import torch
    import torch.nn.functional as F

    from tilelli_jax import config as config_lib
    from tilelli_jax.convert.torch_networks import build
    from tilelli_jax.training.config import ExperimentConfig
    torch.manual_seed(seed)
    model = build(config_lib.to_dict(config_lib.load(ExperimentConfig, "configs/baby-vanilla.yaml").model))
    layers = 4
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            last = name.endswith(("out.weight", "down.weight"))
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if last else 0.02)
    data = np.fromfile(path, np.uint8)
    n_train = int(len(data) * 0.9)
    train, valid = (torch.from_numpy(part.astype(np.int64)) for part in (data[:n_train], data[n_train:]))
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == decays], "weight_decay": decay}
              for decays, decay in ((True, 0.1), (False, 0.0))]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    for step in range(STEPS):
        rate = (1e-3 * (step + 1) / 101 if step < 100 else
                1e-4 + 0.5 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100))) * 9e-4)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(train) - TIME, (BATCH,))
        rows = train[starts[:, None] + torch.arange(TIME + 1)]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    count = (len(valid) - 1) // TIME
    with torch.inference_mode():
        x, y = valid[:count * TIME].view(count, TIME), valid[1:count * TIME + 1].view(count, TIME)
        nats = sum(F.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum").item()
                   for a, b in zip(x.split(64), y.split(64)))
    print(nats / (count * TIME), sum(p.numel() for p in model.parameters()))


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--who", nargs="+", choices=["pytorch", *CONFIGS], default=["pytorch", *CONFIGS])
    parser.add_argument("--require", type=float, metavar="NATS",
                        help="exit with status 1 unless the vanilla network reaches this validation loss "
                             "(nats/byte) with every seed")
    parser.add_argument("--pytorch-seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pytorch_seed is not None:
        pytorch(options.text, options.pytorch_seed)
        return 0
    with tee(options.out) as print_line:
        return compare(options, print_line)


def compare(options: argparse.Namespace, print_line: Callable[[str], None]) -> int:
    """Returns the exit status: 1 if the vanilla network misses the required loss, else 0."""
    print_line(f"{machine()}; {options.text}; seeds {options.seeds}")
    results: dict[str, list[tuple[float, float, int]]] = {variant: [] for variant in options.who}
    with tempfile.TemporaryDirectory() as directory:
        for seed in options.seeds:  # alternate, so that a slow period of the machine affects all variants
            for variant in options.who:
                results[variant].append(run_pytorch(options.text, seed) if variant == "pytorch" else
                                        run_config(variant, options.text, seed, directory))
    rows = [("variant", "parameters", "seconds (median, range)", "× pytorch",
             "validation nats/byte (mean, each)")]
    pytorch_seconds = [run[0] for run in results.get("pytorch", [])]
    for variant, runs in results.items():
        seconds, losses = [run[0] for run in runs], [run[1] for run in runs]
        rows.append((variant, f"{runs[0][2]:,}",
                     f"{statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})",
                     f"{ratio(seconds, pytorch_seconds):.2f}" if pytorch_seconds else "",
                     f"{statistics.mean(losses):.4f} ({', '.join(f'{loss:.4f}' for loss in losses)})"))
    print_line(table(rows))
    if options.require is not None and not all(loss <= options.require for _, loss, _ in results["vanilla"]):
        print_line(f"vanilla: validation loss: expected at most {options.require} with every seed")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
