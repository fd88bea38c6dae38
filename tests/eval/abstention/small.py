"""The smallest configuration of the study, shared by its tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tilelli_jax.data.synthetic import village
from tilelli_jax.data.synthetic.village import files

ROOT = Path(__file__).parents[3]
SHAPE = {"d_model": 16, "n_layers": 2, "max_seq_len": 256, "n_heads": 2, "dense_expand": 2}
SEEDS = (0, 1)
STEPS = 2
N = 40  # prompts to fit and calibrate on; about as many are evaluated, so that all share one compiled shape


def recipe(name: str, **settings: Any) -> dict[str, Any]:
    short = {"steps": STEPS, "batch_size": 8, "eval_every": 2, "eval_bytes": 1000,
             "checkpoint_every": 1} | settings
    return {"train": str(ROOT / f"configs/abstention-{name}.yaml"),
            # Muon compiles more slowly.
            "set": ["optimizer.name=adamw", *(f"train.{key}={value}" for key, value in short.items())]}


def options(out: Path, **changed: Any) -> dict[str, Any]:
    base = recipe("base", seq_len=128)
    base["set"] += [f"model.{key}={value}" for key, value in SHAPE.items()]
    # Without attention, which compiles most slowly.
    base["set"] += ["model.pathways=[local,dense]", "data.village_passes=1", "data.village_people=48"]
    sae = recipe("sae", batch_size=32, eval_batch_size=32)
    sae["set"] += ["model.k=4"]
    return {"out": str(out), "seeds": list(SEEDS),
            "training": {"base": base, "chat": recipe("chat"), "variant": recipe("variant"), "sae": sae},
            "pairs": {"count": 120, "calibration": N, "held_out": 60},
            "prompts": str(out.parent / "prompts.jsonl"), "batch_size": N,
            "answers": {"max_new": 4}, "fitted": {"prompts": N, "rank": 2, "latents": 2, "jobs": 1},
            "replicates": 100} | changed


def write_prompts(path: Path) -> None:
    """Writes five prompts of every regime, cut to the padded length of the calibration prompts."""
    prompts = [prompt._replace(prompt=prompt.prompt[-100:])
               for prompt in village.prompts(village.world(0, 48), 5)]
    path.write_bytes(b"".join(files.regime_files(prompts).values()))
