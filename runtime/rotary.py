"""Rotary table: cosines and sines of every position, with the model's scaling of frequencies.

Shape legend: L positions, H head dim, h = H / 2 frequencies.

Notation: a frequency f turns f x L0 / (2 pi) times over the L0 positions of the first training.
Frequencies that turn often tell near positions apart and are kept; those that turn less than once
are divided by `factor`, so that longer texts stay within the angles seen in training.
Source: `llama3` as published with Llama 3.1; `yarn` arXiv 2309.00071, sections 3.2 to 3.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..search_spaces.schema import ModelSpec, RopeScaling


def rotary_table(model: ModelSpec, device: torch.device) -> Tensor:
    """Cosines, then sines, of all positions, fp32 [L, H]."""
    exponents_h = torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim
    frequencies_h = 1.0 / model.rope_theta**exponents_h
    scaling, amplitude = model.rope_scaling, 1.0
    if scaling is not None:
        frequencies_h = _scaled(frequencies_h, scaling, model)
        amplitude = scaling.attention_factor or 1.0
    positions_L = torch.arange(model.max_position_embeddings, dtype=torch.float32)
    angles_Lh = torch.outer(positions_L, frequencies_h)
    return torch.cat((angles_Lh.cos(), angles_Lh.sin()), dim=-1).mul_(amplitude).to(device)


def _scaled(frequencies_h: Tensor, scaling: RopeScaling, model: ModelSpec) -> Tensor:
    stretched_h = frequencies_h / scaling.factor
    match scaling.rope_type:
        case "linear":
            return stretched_h
        case "llama3":
            kept_h = _kept_by_turns(frequencies_h, scaling)
        case "yarn":
            kept_h = _kept_by_dimension(frequencies_h.shape[0], scaling, model)
    return torch.lerp(stretched_h, frequencies_h, kept_h)


def _kept_by_turns(frequencies_h: Tensor, scaling: RopeScaling) -> Tensor:
    """Share of each frequency that is kept: rises with its turns from `low` to `high`."""
    length, low, high = (
        scaling.original_max_position_embeddings,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    assert length is not None
    assert low is not None
    assert high is not None
    turns_h = frequencies_h * (length / (2 * math.pi))
    return ((turns_h - low) / (high - low)).clamp(0.0, 1.0)


def _kept_by_dimension(num_frequencies: int, scaling: RopeScaling, model: ModelSpec) -> Tensor:
    """Share of each frequency that is kept: falls with its place between two whole places."""
    length, slow, fast = (
        scaling.original_max_position_embeddings,
        scaling.beta_slow,
        scaling.beta_fast,
    )
    assert length is not None
    assert slow is not None
    assert fast is not None

    def place(turns: float) -> float:
        """Where the frequency with so many turns would be."""
        inverse = length / (2 * math.pi * turns)
        return model.head_dim * math.log(inverse) / (2 * math.log(model.rope_theta))

    first = max(math.floor(place(fast)), 0)
    last = min(math.ceil(place(slow)), model.head_dim - 1)
    width = last - first or 0.001
    places_h = torch.arange(num_frequencies, dtype=torch.float32)
    return 1.0 - ((places_h - first) / width).clamp(0.0, 1.0)
