"""What the signals of a prompt are called; which way each points, `eval.abstention.decision` says."""

from __future__ import annotations

ROUTER = ("router_conf", "router_entropy", "router_entropy_var")
HEAD = "abstain_p"
OF_PROMPT = ("max_softmax_last", "max_softmax_mean", *ROUTER, HEAD, "drift")
BLOCK = "router_entropy_b"  # and a block's number
# What the logit lens says of the last position, of Recall's features.
LENS = {"lens_entropy": "a_band_mean_entropy", "lens_settling": "a_settling_layer_norm",
        "lens_margin": "a_max_margin"}
