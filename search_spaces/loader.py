"""Reads specs by name or path: models, hardware, workloads, search spaces.

Shipped specs are YAML files beside this module, one folder a kind; a path to one's own YAML file
is taken wherever a name is. Models are also read from Hugging Face folders (`hf_config.py`), and
workloads from `PROMPT/DECODE` in tokens. The strict part is in `records.py`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml

from .hf_config import load_hf_config
from .records import SpecError, closest, content_hash, from_mapping, read_bounded, to_mapping
from .schema import HardwareSpec, ModelSpec, SearchSpace, WorkloadSpec

__all__ = [
    "Kind",
    "SpecError",
    "content_hash",
    "from_mapping",
    "known",
    "load_hardware",
    "load_model",
    "load_space",
    "load_workload",
    "load_yaml",
    "parse_yaml",
    "to_mapping",
]

Kind = Literal["models", "hardware", "workloads", "spaces"]
SpecT = TypeVar("SpecT", ModelSpec, HardwareSpec, WorkloadSpec, SearchSpace)

_NOUNS: dict[Kind, str] = {
    "models": "model",
    "hardware": "hardware",
    "workloads": "workload",
    "spaces": "search space",
}
_ALSO: dict[Kind, str] = {
    "models": " or of a Hugging Face folder",
    "workloads": ", or PROMPT/DECODE such as 1024/512",
}
_MAX_NODES = 1_000_000
_LENGTHS = re.compile(r"(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)")


def known(kind: Kind) -> tuple[str, ...]:
    """Names of the shipped specs of a kind, sorted."""
    assert kind in get_args(Kind), kind
    folder = files("nanoflow_tune.search_spaces").joinpath(kind)
    names = [Path(entry.name) for entry in folder.iterdir()]
    return tuple(sorted(name.stem for name in names if name.suffix == ".yaml"))


def load_model(name_or_path: str | Path) -> ModelSpec:
    """A shipped model, a YAML file, or a Hugging Face folder or `config.json`.

    A shipped name wins over a folder of the same name; write `./name` for the folder.

    Raises:
        SpecError: unknown name, or a file that breaks a rule.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name not in known("models") and (path.is_dir() or path.suffix == ".json"):
        return load_hf_config(path)
    return _load("models", ModelSpec, name)


def load_hardware(name: str | Path) -> HardwareSpec:
    """A shipped accelerator, or one's own YAML file.

    Raises:
        SpecError: unknown name, or a file that breaks a rule.
    """
    return _load("hardware", HardwareSpec, str(name))


def load_workload(name: str | Path) -> WorkloadSpec:
    """A shipped workload, mean lengths as `PROMPT/DECODE` (`1024/512`), or one's own YAML file.

    Raises:
        SpecError: unknown name, or a file that breaks a rule.
    """
    lengths = _LENGTHS.fullmatch(str(name))
    if lengths is None:
        return _load("workloads", WorkloadSpec, str(name))
    prompt, decode = lengths.groups()
    values = {
        "name": f"{prompt}-{decode}",
        "prompt_tokens": float(prompt),
        "decode_tokens": float(decode),
    }
    return from_mapping(WorkloadSpec, values, f"workload {name}")


def load_space(name: str | Path) -> SearchSpace:
    """A shipped search space (an effort preset), or one's own YAML file.

    Raises:
        SpecError: unknown name, or a file that breaks a rule.
    """
    return _load("spaces", SearchSpace, str(name))


def load_yaml(path: Path | Traversable) -> dict[str, Any]:
    """The mapping that a YAML file holds; no Python objects, no duplicate keys.

    Raises:
        SpecError: the file cannot be read, is no UTF-8, no YAML, or no mapping.
    """
    where = str(path)
    try:
        text = read_bounded(path).decode("utf-8")
    except OSError as err:
        raise SpecError(f"{where}: cannot be read ({err.strerror}); check the path") from err
    except UnicodeDecodeError as err:
        raise SpecError(f"{where}: must be UTF-8 text, but byte {err.start} is not") from err
    return parse_yaml(text, where)


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping that a text in YAML holds, as strictly as `load_yaml`.

    Raises:
        SpecError: no YAML, or no mapping.
    """
    try:
        value = _read(text)
    except yaml.YAMLError as err:
        raise SpecError(f"{where}: must be valid YAML, but {_one_line(err)}") from err
    except (ValueError, LookupError, AttributeError, TypeError) as err:
        # PyYAML lets these out where a tag does not fit its node, such as `!!map [a]`.
        raise SpecError(f"{where}: must be valid YAML, but a tag does not fit its value") from err
    except RecursionError as err:
        raise SpecError(f"{where}: must not nest this deeply; flatten it") from err
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise SpecError(f"{where}: must hold a mapping (`key: value` lines), but holds a {kind}")
    return value


def _read(text: str) -> object:
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded_size(node, {}) > _MAX_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"its aliases stand for more than {_MAX_NODES} values; write less",
                problem_mark=node.start_mark,
            )
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values in a tree with every alias written out: a few lines of them can be gigabytes."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise yaml.MarkedYAMLError(
                problem="an alias stands for what holds it", problem_mark=node.start_mark
            )
        return sizes[id(node)]
    sizes[id(node)] = 0  # not known yet
    size = 1
    if isinstance(node, yaml.SequenceNode):
        size += sum(_expanded_size(item, sizes) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        size += sum(_expanded_size(item, sizes) for pair in node.value for item in pair)
    sizes[id(node)] = size
    return size


class _StrictLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses duplicate keys and reports every bad scalar as YAML error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key.value!r} is given twice; keep one",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401
        try:
            return super().construct_object(node, deep)
        # PyYAML lets these out for scalars such as `2001-99-99` or `!!int ''`.
        except (ValueError, LookupError, AttributeError, TypeError) as err:
            raise yaml.constructor.ConstructorError(
                problem=f"a value cannot be read as {node.tag}", problem_mark=node.start_mark
            ) from err


def _one_line(err: yaml.YAMLError) -> str:
    if not isinstance(err, yaml.MarkedYAMLError) or err.problem_mark is None:
        return " ".join(str(err).split())
    mark = err.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {err.problem}"


def _load(kind: Kind, cls: type[SpecT], name: str) -> SpecT:
    if name in known(kind):
        path = files("nanoflow_tune.search_spaces").joinpath(kind, f"{name}.yaml")
        return from_mapping(cls, load_yaml(path), f"{kind}/{name}.yaml")
    if Path(name).suffix in (".yaml", ".yml"):
        return from_mapping(cls, load_yaml(Path(name)), name)
    names = known(kind)
    raise SpecError(
        f"unknown {_NOUNS[kind]} {name!r}{closest(name, names)} known are "
        f"{', '.join(names)}; or give the path of a YAML file{_ALSO.get(kind, '')}"
    )
