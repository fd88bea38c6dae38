"""Runs the notebooks of docs/notebooks and stores their outputs: python tools/notebooks.py [FILE …]"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def run(path: Path, directory: Path) -> nbformat.NotebookNode:
    """Returns the notebook with the outputs of one run in a directory.

    `!tilelli` in a cell is the command of this environment.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # as the Makefile sets it
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, kernel_name="python3", record_timing=False, coalesce_streams=True,
                   resources={"metadata": {"path": str(directory)}}).execute()
    for cell in notebook.cells:  # progress bars overwrite their line: keep what a terminal ends up with
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = "\n".join(line.rpartition("\r")[2] for line in
                                        output.text.replace("\r\n", "\n").split("\n"))
    return notebook


def main() -> None:
    named = [Path(name) for name in sys.argv[1:]]
    for path in named or sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            notebook = run(path, Path(directory))
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
