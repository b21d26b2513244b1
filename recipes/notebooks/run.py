"""
Run the notebooks of this folder and keep their outputs in them.

    pip install "echo-trainer[notebook]"
    python recipes/notebooks/run.py              all of them, in place
    python recipes/notebooks/run.py --check      run copies, and change nothing

Every notebook runs in an empty folder, offline, and anew: what it shows is what it makes.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def run(path: Path, timeout: int = 600) -> nbformat.NotebookNode:
    """
    A notebook with the outputs of its cells.

    Args:
        path: of the notebook; it is not changed.
        timeout: seconds that a cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
        if cell.cell_type == "code":
            cell.outputs = kept(cell.outputs)
    return notebook


def kept(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs without progress bars; where these cut a text in two depends on the machine, so it is made whole."""
    whole: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if "execution_count" in output:
            output.execution_count = None
        if whole and output.output_type == whole[-1].output_type == "stream":
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="run copies, and change nothing")
    options = parser.parse_args()
    for path in sorted(HERE.glob("*.ipynb")):
        print(path.name, flush=True)
        notebook = run(path)
        if not options.check:
            nbformat.write(notebook, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
