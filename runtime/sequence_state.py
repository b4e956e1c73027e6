"""A request on its way through the engine: what is computed and sampled, where its pages are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .sequence import GenerationRequest, OnEvent

State = Literal["waiting", "running", "swapped", "finished"]


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One request; the scheduler alone changes it.

    `num_computed` counts positions whose keys are in the cache or will be after the steps issued so
    far. A step is formed while the one before runs, so tokens may be sampled and not known yet.
    """

    request: GenerationRequest
    on_event: OnEvent
    order: int
    """By arrival."""
    seed: int
    token_ids: list[int]
    """Prompt, then the generated tokens that are known."""
    state: State = "waiting"
    slot: int = -1
    pages: list[int] = field(default_factory=list[int])
    num_computed: int = 0
    num_in_flight: int = 0
    """Tokens sampled by issued steps and not known yet."""
    swap_key: int = -1
    num_swapped_pages: int = 0
    num_prompt_tokens: int = field(init=False)
    """Length of the prompt; a field, as are the others that every step reads."""
    max_tokens: int = field(init=False)
    """Most tokens it may generate."""

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.request.prompt_token_ids)
        self.max_tokens = self.request.sampling.max_tokens

    @property
    def num_generated(self) -> int:
        """Known generated tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_prefilling(self) -> bool:
        """Prompt tokens are left to compute."""
        return self.num_computed < self.num_prompt_tokens

    @property
    def can_decode(self) -> bool:
        """Past its prompt, with a token left to generate beyond those in flight."""
        generated = len(self.token_ids) - self.num_prompt_tokens + self.num_in_flight
        return self.num_computed >= self.num_prompt_tokens and generated < self.max_tokens
