"""Rotary scaling of a Hugging Face `config.json`: what transformers would compute, or a refusal.

`rope_parameters` is the newer place, `rope_scaling` the older one, and `type` the older name of
`rope_type`. Defaults are those of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast, get_args

from .records import SpecError
from .schema import ROPE_KEYS, RopeType

_TYPE_KEYS = ("rope_type", "type")
_YARN_DEFAULTS = {"beta_slow": 1.0, "beta_fast": 32.0}


def rope_parameters(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The configuration's rotary settings, empty when it has none.

    Raises:
        SpecError: they are no object.
    """
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key) or {}
        if not isinstance(value, dict):
            raise SpecError(f"{where}: `{key}`: must be an object or null, but got {value!r}")
        found |= cast("dict[str, Any]", value)
    return found


def rope_scaling(config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Values for a `RopeScaling`, or None where frequencies are not scaled.

    Raises:
        SpecError: a type that is not supported, or an option of `yarn` that is not.
    """
    rope = rope_parameters(config, where)
    kind = next((rope[key] for key in _TYPE_KEYS if rope.get(key) is not None), "default")
    if kind == "default":
        return None
    if kind not in get_args(RopeType):
        raise SpecError(
            f"{where}: rotary scaling of type {kind!r} is not supported, and leaving it out would "
            f"change the model's results; supported are {', '.join(get_args(RopeType))}: choose a "
            "checkpoint with one of them, or without scaling"
        )
    values = {key: rope.get(key) for key in ("factor", *ROPE_KEYS[cast("RopeType", kind)])}
    if "original_max_position_embeddings" in values:
        # Some configurations have it beside the scaling, not in it.
        beside = config.get("original_max_position_embeddings")
        before = values["original_max_position_embeddings"]
        default = config.get("max_position_embeddings")
        values["original_max_position_embeddings"] = before or beside or default
    if kind == "yarn":
        values |= _yarn(rope, where)
    missing = [key for key, value in values.items() if value is None]
    if missing:
        raise SpecError(
            f"{where}: rotary scaling of type {kind!r} needs {', '.join(missing)}; add what is "
            "missing"
        )
    return {"rope_type": kind, **values}


def _yarn(rope: Mapping[str, Any], where: str) -> dict[str, Any]:
    if rope.get("truncate", True) is not True:
        raise SpecError(
            f"{where}: rotary scaling of type 'yarn' with `truncate: false` is not supported; "
            "choose a checkpoint without it"
        )
    values = {key: rope.get(key) or default for key, default in _YARN_DEFAULTS.items()}
    return values | {"attention_factor": _attention_factor(rope)}


def _attention_factor(rope: Mapping[str, Any]) -> Any:  # noqa: ANN401 - whatever the file holds
    """Given, or what `yarn` takes for the factor: 0.1 ln(factor) + 1."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    numbers = [rope.get(key) for key in ("factor", "mscale", "mscale_all_dim")]
    factor, *scales = (n if isinstance(n, int | float) and n > 0 else 0.0 for n in numbers)
    if not factor:
        return None
    logarithm = 0.1 * math.log(max(1.0, factor))
    if not all(scales):
        return logarithm + 1.0
    return (scales[0] * logarithm + 1.0) / (scales[1] * logarithm + 1.0)
