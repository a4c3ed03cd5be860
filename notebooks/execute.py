"""Execute the notebooks, each in a copy in a temporary directory, and fail on the first error.

Usage: `python notebooks/execute.py [--write] [NOTEBOOK ...]`; without names, all of them.
`--write` puts the fresh outputs into the notebook: outputs are committed.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
CELLS = 25  # per notebook
LINES = 15  # per code cell
TIMEOUT = 600  # seconds per cell


def faults(notebook: nbformat.NotebookNode, *, outputs: bool) -> list[str]:
    """Return what is wrong with the notebook as it is stored; `outputs` asks for committed outputs too."""
    found = []
    if len(notebook.cells) > CELLS:
        found.append(
            f"expected at most {CELLS} cells, got {len(notebook.cells)}; split it, or move logic out"
        )
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type != "code":
            continue
        lines = len(cell.source.splitlines())
        if lines > LINES:
            found.append(
                f"cell {number}: expected at most {LINES} lines, got {lines}; logic belongs in hybridopt"
            )
        if outputs and cell.source.strip() and cell.execution_count is None:
            found.append(f"cell {number}: never executed; commit outputs with notebooks/execute.py --write")
    return found


def execute(path: Path, *, write: bool) -> list[str]:
    """Execute one notebook and return what went wrong; with `write`, replace the file by the executed one."""
    notebook = nbformat.read(path, as_version=4)
    found = faults(notebook, outputs=not write)
    with tempfile.TemporaryDirectory(prefix="notebook-") as directory:
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": directory}},
        )
        try:
            client.execute()
        except CellExecutionError as error:
            found.append(str(error))
    if write and not found:
        nbformat.write(notebook, path)
    return found


def main() -> int:
    """Execute what the command line names and return the number of notebooks that failed."""
    parser = argparse.ArgumentParser(description="Execute the notebooks.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of them")
    parser.add_argument("--write", action="store_true", help="store the fresh outputs in the notebook")
    arguments = parser.parse_args()
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # the kernel's debugger warns otherwise
    paths = arguments.notebooks or sorted(HERE.glob("*.ipynb"))
    if not paths:
        parser.error(f"no notebook in {HERE}")
    failed = 0
    for path in paths:
        start = time.perf_counter()
        found = execute(path, write=arguments.write)
        failed += bool(found)
        print(f"{path.name}: {'FAILED' if found else 'ok'}, {time.perf_counter() - start:.1f} s", flush=True)
        for fault in found:
            print(f"  {fault}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
