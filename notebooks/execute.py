"""Executes the notebooks beside this file and keeps their outputs: `make notebooks`. `make test`
executes them too, and keeps nothing.
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def main() -> None:
    """Every notebook, in the order of their names. Times and versions are left out: they would
    change with every run.
    """
    for path in sorted(HERE.glob("*.ipynb")):
        print(path.name)
        notebook = nbformat.read(path, as_version=4)
        metadata = dict(notebook.metadata)
        client = NotebookClient(
            notebook,
            timeout=600,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(HERE)}},
        )
        client.execute()
        notebook.metadata = metadata
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
