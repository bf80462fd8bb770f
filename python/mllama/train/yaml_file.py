"""YAML of plain values, read strictly."""

from pathlib import Path
from typing import Any


def read_yaml(path: Path) -> Any:
    """The value of a YAML file. Repeated keys, aliases and tags of Python objects are rejected.

    Raises:
        ValueError: the file is not UTF-8 or not such YAML. The error names the file and line.
        ImportError: PyYAML is missing.
    """
    try:
        import yaml
    except ImportError:
        raise ImportError('reading a config needs PyYAML: pip install "mllama[train]"') from None

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few could unfold to gigabytes
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(None, None, "aliases are not supported", mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            found = super().construct_mapping(node, deep)
            if len(found) != len(node.value):
                repeated = _repeated([str(name.value) for name, _ in node.value])
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {repeated!r} is repeated", node.start_mark
                )
            return found

    try:
        return yaml.load(path.read_bytes().decode("utf-8-sig"), Loader)  # noqa: S506
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8: {error.reason} at byte {error.start}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        problem = str(error).partition("\n")[0][:200]
        raise ValueError(f"{path}: not valid YAML: {problem}") from None
    except RecursionError:
        raise ValueError(f"{path}: not valid YAML: nested too deep") from None


def _repeated(names: list[str]) -> str:
    return next((name for name in names if names.count(name) > 1), names[0])[:60]


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write settings, in their order; tuples as lists."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)
    path.write_text(yaml.dump(values, Dumper=Dumper, sort_keys=False), encoding="utf-8")
