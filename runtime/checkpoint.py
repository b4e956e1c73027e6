"""Weights of one rank from a Hugging Face folder: `config.json` and safetensors, sharded or not.

    model, weights = load_checkpoint(Path("llama3-8b"), rank=0, tp_degree=2, device=device)

Only this rank's slices are read; files are mapped, not loaded. Pickled files (`.bin`, `.pt`) can
run code when they are opened and are refused. Tensors that the model does not have are refused too:
to leave them out would change its results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..search_spaces.hf_config import load_hf_config
from ..search_spaces.schema import Dtype, ModelSpec
from .op_graph import OpGraph
from .weights import Weights, build_weights, torch_dtype

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth")
_READABLE = ("BF16", "F16", "F32")
_UNUSED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Tensors of older checkpoints that are computed from the configuration."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file or tensor and the remedy."""


def load_checkpoint(
    folder: Path,
    *,
    rank: int = 0,
    tp_degree: int = 1,
    device: torch.device,
    dtype: Dtype | None = None,
    with_o_columns: bool = False,
) -> tuple[ModelSpec, Weights]:
    """The model that a folder describes, and one rank's share of its weights.

    Args:
        folder: holds `config.json` and `model.safetensors`, or shards with their index.
        rank: this tensor-parallel rank.
        tp_degree: ranks in all.
        device: where the weights go.
        dtype: what they are converted to; by default what `config.json` says.
        with_o_columns: the output projection split by columns as well, for plans that gather.

    Raises:
        SpecError: `config.json` is missing or describes a model that is not supported.
        CheckpointError: no safetensors; a missing, damaged or unexpected file or tensor; a wrong
            shape or type; a value that float16 cannot hold.
        ValueError: the model does not divide by `tp_degree`.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: must be a folder with config.json and safetensors files")
    if not 0 <= rank < tp_degree:
        raise ValueError(f"`rank` must be in [0, {tp_degree}), but got rank={rank}")
    model = load_hf_config(folder)
    if dtype is not None:
        model = replace(model, torch_dtype=dtype)
    OpGraph.build(model, tp_degree)  # refuses a degree that does not divide the model
    with ExitStack() as stack:
        reader = _Reader(folder, model, device, stack)
        weights = build_weights(
            model,
            reader,
            rank=rank,
            tp_degree=tp_degree,
            device=device,
            with_o_columns=with_o_columns,
        )
        reader.check_all_read()
    return model, weights


class _Reader:
    """A `weights.Source` over the files of a folder."""

    def __init__(
        self, folder: Path, model: ModelSpec, device: torch.device, stack: ExitStack
    ) -> None:
        self._folder, self._model, self._device = folder, model, device
        self._dtype = torch_dtype(model.torch_dtype)
        self._files = _file_of_tensor(folder)
        names = sorted(set(self._files.values()))
        self._shards = {name: stack.enter_context(_open(folder / name)) for name in names}
        self._held = {
            tensor: name for name, shard in self._shards.items() for tensor in _tensors_of(shard)
        }
        self._read: set[str] = set()

    def __call__(
        self, name: str, shape: tuple[int, ...], dim: int, part: tuple[int, int]
    ) -> Tensor:
        """This rank's part of one matrix, on the device, in the model's dtype."""
        self._read.add(name)
        file = self._files.get(name)
        if file is None:
            raise CheckpointError(
                f"{self._folder}: has no tensor {name!r}, which config.json asks for "
                f"({self._model.architecture}, {self._model.num_hidden_layers} layers); is the "
                "checkpoint complete, and does config.json belong to it?"
            )
        if self._held.get(name) != file:
            raise CheckpointError(
                f"{self._folder / file}: has no tensor {name!r}, although {_INDEX} says so; "
                "download both again"
            )
        stored = self._shards[file].get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise CheckpointError(
                f"{self._folder / file}: {name!r} must have shape {shape} by config.json, but has "
                f"{tuple(stored.get_shape())}; does config.json belong to this checkpoint?"
            )
        if stored.get_dtype() not in _READABLE:
            raise CheckpointError(
                f"{self._folder / file}: {name!r} has type {stored.get_dtype()}, but weights must "
                f"be one of {', '.join(_READABLE)}; choose a checkpoint that is not quantised"
            )
        x = stored[(slice(None),) * dim + (slice(*part),)]
        x = x.to(device=self._device, dtype=self._dtype).contiguous()
        if self._dtype == torch.float16 and not x.isfinite().all():
            raise CheckpointError(
                f"{self._folder / file}: {name!r} has values that float16 cannot hold; load it "
                "with dtype bfloat16 or float32"
            )
        return x

    def check_all_read(self) -> None:
        """Refuse tensors that nothing asked for."""
        unread = sorted(name for name in self._files if name not in self._read)
        if self._model.tie_word_embeddings:
            unread = [name for name in unread if name != "lm_head.weight"]
        unread = [name for name in unread if not name.endswith(_UNUSED_SUFFIXES)]
        if unread:
            raise CheckpointError(
                f"{self._folder}: holds {len(unread)} tensors that a {self._model.architecture} "
                f"model of {self._model.num_hidden_layers} layers does not have, the first is "
                f"{unread[0]!r}; leaving them out would change the model's results"
            )


def _file_of_tensor(folder: Path) -> dict[str, str]:
    """Which file holds which tensor."""
    if (folder / _INDEX).exists():
        files = _read_index(folder / _INDEX)
    elif (folder / _SINGLE).exists():
        with _open(folder / _SINGLE) as single:
            files = dict.fromkeys(_tensors_of(single), _SINGLE)
    else:
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if pickled:
            raise CheckpointError(
                f"{folder}: holds weights only in pickled files ({pickled[0]}), which can run code "
                "when they are opened; convert them with transformers' `save_pretrained`, or "
                "download the safetensors version"
            )
        raise CheckpointError(
            f"{folder}: must hold {_SINGLE}, or {_INDEX} and its shards, but holds neither"
        )
    shards = sorted(set(files.values()))
    try:
        missing = [file for file in shards if not (folder / file).is_file()]
    except OSError as err:  # a name that is too long
        raise CheckpointError(
            f"{folder / _INDEX}: names files that cannot be: {err.strerror}; download it again"
        ) from err
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} shards that {_INDEX} names are missing: "
            f"{', '.join(missing[:4])}; download them"
        )
    return files


def _read_index(path: Path) -> dict[str, str]:
    try:
        index: Any = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise CheckpointError(f"{path}: must be valid JSON in UTF-8, but {err}") from err
    files = cast("Mapping[str, Any]", index).get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path}: must have a `weight_map`, but has none; download it again")
    found = cast("dict[str, Any]", files)
    for file in found.values():
        # A shard lies beside its index; a path could lead anywhere.
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{path}: `weight_map` must name .safetensors files of its own folder, but names "
                f"{file!r}"
            )
    return found


def _tensors_of(shard: Any) -> list[str]:  # noqa: ANN401
    return list(shard.keys())


def _open(path: Path) -> Any:  # noqa: ANN401 - safetensors has no types
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as err:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors ({err}); download it again"
        ) from err
