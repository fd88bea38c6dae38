"""Names of a prompt's signals. `eval.abstention.decision` defines the direction of each."""

from __future__ import annotations

ROUTER = ("router_conf", "router_entropy", "router_entropy_var")
HEAD = "abstain_p"
PROMPT_SIGNALS = ("max_softmax_last", "max_softmax_mean", *ROUTER, HEAD, "drift")
BLOCK = "router_entropy_b"  # prefix; the block's number follows
# Logit-lens signals of the last position → the Recall feature of the same value.
LENS = {"lens_entropy": "a_band_mean_entropy", "lens_settling": "a_settling_layer_norm",
        "lens_margin": "a_max_margin"}
