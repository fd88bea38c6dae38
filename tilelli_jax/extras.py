"""Optional packages, and how to install the one that is missing."""

from __future__ import annotations

from tilelli_jax.errors import InputError

# The extra of pyproject.toml that brings a package, by the name that is imported.
EXTRA = {
    "datasets": "hf", "jinja2": "hf", "tokenizers": "hf", "transformers": "hf", "torch": "torch",
    "gradio": "app", "plotly": "app", "pyarrow": "eval", "scipy": "eval", "sklearn": "eval",
    "statsmodels": "eval", "tensorboardX": "tensorboard", "wandb": "wandb", "libtpu": "tpu",
}
# What each brings: distributions of which one suffices.
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "cuda": ("jax-cuda12-plugin", "jax-cuda13-plugin"), "tpu": ("libtpu",), "metal": ("jax-mps",),
    "eval": ("scikit-learn",), "app": ("gradio",), "hf": ("datasets",), "torch": ("torch",),
    "tensorboard": ("tensorboardX",), "wandb": ("wandb",)}


def missing(name: str, what: str) -> InputError:
    """The error for a package that is not installed.

    Args:
        name: as it is imported; a module inside the package will do.
        what: needs it.
    """
    package = name.partition(".")[0]
    return InputError(f"{what} needs {package}: pip install 'tilelli_jax[{EXTRA[package]}]'")


def is_optional(name: str | None) -> bool:
    """Whether a module belongs to a package that an extra brings."""
    return (name or "").partition(".")[0] in EXTRA
