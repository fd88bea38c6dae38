"""Optional packages, and the error that says how to install a missing one."""

from __future__ import annotations

import importlib.util

from tilelli_jax.errors import InputError

# Import name of a package → the extra of pyproject.toml that installs it.
EXTRA = {
    "datasets": "hf", "huggingface_hub": "hf", "jinja2": "hf", "tokenizers": "hf", "transformers": "hf",
    "accelerate": "torch", "torch": "torch",
    "gguf": "gguf", "lm_eval": "lm-eval", "gradio": "app", "plotly": "app", "pyarrow": "eval",
    "scipy": "eval", "sklearn": "eval", "statsmodels": "eval", "tensorboardX": "tensorboard",
    "wandb": "wandb", "libtpu": "tpu",
    "starlette": "serve", "uvicorn": "serve", "prometheus_client": "serve",
}
# Extra → distributions, any of which shows that the extra is installed.
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "cuda": ("jax-cuda12-plugin", "jax-cuda13-plugin"), "tpu": ("libtpu",), "metal": ("jax-mps",),
    "eval": ("scikit-learn",), "gguf": ("gguf",), "app": ("gradio",), "hf": ("datasets",),
    "torch": ("torch",), "lm-eval": ("lm_eval",),
    "serve": ("prometheus-client",),
    "tensorboard": ("tensorboardX",), "wandb": ("wandb",)}


def missing(name: str, what: str) -> InputError:
    """Returns the error for a package that is not installed.

    Args:
        name: import name of the package or of a module inside it.
        what: the command or setting that needs it.
    """
    package = name.partition(".")[0]
    return InputError(f"{what} needs {package}: pip install 'tilelli_jax[{EXTRA[package]}]'")


def require(name: str, what: str) -> None:
    """Raises InputError, see `missing`, if a package is not installed. Does not import it."""
    if importlib.util.find_spec(name) is None:
        raise missing(name, what)


def is_optional(name: str | None) -> bool:
    """Whether a module belongs to a package that an extra installs."""
    return (name or "").partition(".")[0] in EXTRA
