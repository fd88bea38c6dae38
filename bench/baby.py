"""nanoGPT's CPU "baby" setting: python -m bench.baby TEXT [--seeds 0 1 2].

TEXT is tiny Shakespeare (or any text file; its last tenth validates). Each model is a process
of its own, timed from start to end, imports and compilation included, and ends with the loss on
the whole validation part, in nats/byte:

    pytorch     nanoGPT's network and settings restated in eager PyTorch, 2000 updates
    vanilla     the same network and settings here
    lite        the Lite block at equal parameters and budget
    fast        the vanilla network with an optimiser and schedule of our own
    fast-lite   likewise Lite
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

from bench.measure import arguments, machine, ratio, told
from tilelli_jax.tables import table

OURS = {"vanilla": "baby-vanilla", "lite": "baby-lite", "fast": "baby-fast", "fast-lite": "baby-fast-lite"}
STEPS, BATCH, TIME = 2000, 12, 64


def run_ours(name: str, text: str, seed: int, directory: str) -> tuple[float, float, int]:
    """Seconds of the process, final validation loss, parameters."""
    run_dir = Path(directory, f"{name}-{seed}")
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tilelli_jax.train", "--config", f"configs/{OURS[name]}.yaml",
                    f"data.source={text}", f"run_dir={run_dir}", f"seed={seed}",
                    f"data.shuffle_seed={seed}"], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    summary = json.loads((run_dir / "summary.json").read_text())
    return seconds, summary["final_valid_loss"], summary["parameters"]


def run_pytorch(text: str, seed: int) -> tuple[float, float, int]:
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "bench.baby", text, "--pytorch-seed", str(seed)],
                          check=True, capture_output=True, text=True)
    loss, parameters = done.stdout.split()[-2:]
    return time.perf_counter() - begin, float(loss), int(parameters)


def pytorch(path: str, seed: int) -> None:
    """Trains as nanoGPT does: N(0, 0.02) weights, AdamW 1e-3 → 1e-4, betas 0.9/0.99, decay 0.1."""
    import math

    import torch
    import torch.nn.functional as F
    from tilelli_jax.convert.torch_networks import build

    from tilelli_jax import config as config_lib
    from tilelli_jax.training.experiment import ExperimentConfig
    torch.manual_seed(seed)
    model = build(config_lib.to_dict(config_lib.load(ExperimentConfig, "configs/baby-vanilla.yaml").model))
    layers = 4
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            last = name.endswith(("out.weight", "down.weight"))
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if last else 0.02)
    data = np.fromfile(path, np.uint8)
    cut = int(len(data) * 0.9)
    train, valid = (torch.from_numpy(part.astype(np.int64)) for part in (data[:cut], data[cut:]))
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
    parser.add_argument("--who", nargs="+", choices=["pytorch", *OURS], default=["pytorch", *OURS])
    parser.add_argument("--require", type=float, metavar="NATS",
                        help="exit 1 unless the vanilla network comes to this loss with every seed")
    parser.add_argument("--pytorch-seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pytorch_seed is not None:
        pytorch(options.text, options.pytorch_seed)
        return 0
    with told(options.out) as tell:
        return compare(options, tell)


def compare(options: argparse.Namespace, tell: Callable[[str], None]) -> int:
    """Exit status: 1 where the vanilla network misses the loss that is required of it."""
    tell(f"{machine()}; {options.text}; seeds {options.seeds}")
    found: dict[str, list[tuple[float, float, int]]] = {who: [] for who in options.who}
    with tempfile.TemporaryDirectory() as directory:
        for seed in options.seeds:  # in turn, so that a slow spell of the machine meets all of them
            for who in options.who:
                found[who].append(run_pytorch(options.text, seed) if who == "pytorch" else
                                  run_ours(who, options.text, seed, directory))
    rows = [("who", "parameters", "seconds (median, range)", "of pytorch",
             "validation nats/byte (mean, each)")]
    theirs = [run[0] for run in found.get("pytorch", [])]
    for who, runs in found.items():
        seconds, losses = [run[0] for run in runs], [run[1] for run in runs]
        rows.append((who, f"{runs[0][2]:,}",
                     f"{statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})",
                     f"{ratio(seconds, theirs):.2f}" if theirs else "",
                     f"{statistics.mean(losses):.4f} ({', '.join(f'{loss:.4f}' for loss in losses)})"))
    tell(table(rows))
    if options.require is not None and not all(loss <= options.require for _, loss, _ in found["vanilla"]):
        tell(f"vanilla: not all at or below {options.require}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
