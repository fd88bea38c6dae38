"""`python -m tilelli_jax.eval.harness …`: lm_eval's own command line with the model `tilelli` registered.

Versions of lm_eval that read the entry points of group `lm_eval.models` find the model without this module.
"""

import sys
from collections.abc import Sequence

from tilelli_jax import extras
from tilelli_jax.cli.command import command


@command
def main(argv: Sequence[str]) -> None:
    extras.require("lm_eval", "tilelli_jax.eval.harness")
    from lm_eval.__main__ import cli_evaluate

    from . import adapter  # noqa: F401 (registers the model)
    sys.argv = ["lm_eval", *argv]
    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
