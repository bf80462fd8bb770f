"""Execute the notebooks in this folder and save their outputs (`make notebooks`). `make test`
executes them without saving.
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def main() -> None:
    """Execute every notebook in order. Times and versions are removed, because they change with
    every run.
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
