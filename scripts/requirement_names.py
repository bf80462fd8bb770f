"""Print the names of what the package and its tests need, without their versions, for an
environment with versions of its own choice.
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirement in (*project["dependencies"], *project["optional-dependencies"]["test"]):
    print(re.match(r"[\w.-]+", requirement)[0])
