"""The locked requirements and the metadata agree."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def locked(name: str) -> dict[str, set[str]]:
    """Package -> versions, of a lock file; several where Python versions differ."""
    versions: dict[str, set[str]] = {}
    for line in (ROOT / name).read_text().splitlines():
        if match := re.match(r"([\w.-]+)==([\w.]+)", line):
            versions.setdefault(canonicalize_name(match[1]), set()).add(match[2])
    return versions


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-oldest.lock"])
def test_the_lock_holds_every_declared_requirement_within_its_range(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for group in project["optional-dependencies"].values() for text in group]
    versions = locked(name)
    for text in (*project["dependencies"], *extras):
        requirement = Requirement(text)
        held = versions[canonicalize_name(requirement.name)]
        assert held and all(requirement.specifier.contains(version) for version in held), text


def test_the_oldest_lock_has_the_lowest_versions_of_the_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = locked("requirements-oldest.lock")
    for text in project["dependencies"]:
        requirement = Requirement(text)
        lowest = next(clause.version for clause in requirement.specifier if clause.operator == ">=")
        (held,) = versions[canonicalize_name(requirement.name)]
        assert held == lowest or held.startswith(lowest + "."), text


def test_the_build_and_the_lock_have_one_torch():
    (pinned,) = (
        text
        for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
        if "torch" in text
    )
    assert (
        pinned == f"torch=={next(iter(locked('requirements.lock')['torch']))}"
        and pinned in (ROOT / "requirements.in").read_text()
    )
