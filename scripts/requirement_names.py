"""Print the requirements of the package and its tests without versions, for an environment with
other versions.
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirement in (*project["dependencies"], *project["optional-dependencies"]["test"]):
    print(re.match(r"[\w.-]+", requirement)[0])
