"""What `/v1/completions` and `/v1/chat/completions` take, checked by pydantic.

Parameters of the OpenAI API that this server does not compute are taken at the value that changes
nothing, and refused by name otherwise; unknown ones are refused. Beyond the OpenAI API: `top_k`,
`ignore_eos`, `stop_token_ids`, `return_token_ids`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .sequence import MAX_LOGPROBS, SamplingParams

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_COMPLETION_LOGPROBS = 5
DEFAULT_COMPLETION_TOKENS = 16

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "store": (False,),
    "reasoning_effort": (),
    "verbosity": (),
}
"""Parameters that are not computed: the values, beside null, at which they change nothing."""
_WITHOUT_EFFECT = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "user",
)
"""They change no result here, whatever they are set to."""

NonEmpty = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, strict=True)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class StreamOptions(_Strict):
    """How to stream."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Taken and not done: it pads chunks against eavesdroppers on token lengths."""


class GenerationBody(_Strict):
    """What both kinds of request share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """0 and -1 keep all tokens."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] = []
    ignore_eos: bool = False
    return_token_ids: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_computed(cls, values: Any) -> Any:  # noqa: ANN401
        if not isinstance(values, dict):
            return values
        given = cast("dict[str, Any]", values)
        for name, neutral in _NEUTRAL.items():
            value = given.get(name)
            if value is not None and value not in neutral:
                raise ValueError(
                    f"`{name}` is not supported by this server, but got {_short(value)}; "
                    "leave it out"
                )
        dropped = (*_NEUTRAL, *_WITHOUT_EFFECT)
        return {name: value for name, value in given.items() if name not in dropped}

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` goes with `stream: true` only; leave it out")
        return self

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def most_tokens(self) -> int | None:
        """Most tokens to generate; None: as many as fit."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report beside each token; None: no log-probabilities."""
        return None

    def sampling(self, room: int, seed: int | None) -> SamplingParams:
        """How to sample one choice.

        Args:
            room: most tokens that fit behind the prompt.
            seed: of this choice.
        """
        return SamplingParams(
            max_tokens=room if self.most_tokens is None else self.most_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            seed=seed,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=self.num_logprobs,
        )


class CompletionBody(GenerationBody):
    """Body of `/v1/completions`."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | TokenIds
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of not in (None, self.num_choices):
            raise ValueError(
                f"`best_of` other than `n` is not supported, but got best_of={self.best_of}, "
                f"n={self.num_choices}; leave it out"
            )
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry a prompt, in text or in token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [cast("list[int]", self.prompt)]
        return cast("list[str] | list[list[int]]", self.prompt)

    @property
    def most_tokens(self) -> int | None:
        """Most tokens to generate; OpenAI's default is small."""
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report beside each token."""
        return self.logprobs


class TextPart(_Strict):
    """A piece of a message; other kinds (images, sound) are refused."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None

    def as_template_input(self) -> dict[str, str]:
        """Role, text and name, as chat templates read them."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class ChatBody(GenerationBody):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of `max_tokens`."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise ValueError(
                "`max_tokens` and `max_completion_tokens` must agree when both are given, but got "
                f"{old} and {new}; leave `max_tokens` out"
            )
        if self.top_logprobs and not self.logprobs:
            raise ValueError("`top_logprobs` goes with `logprobs: true` only; set it")
        return self

    @property
    def most_tokens(self) -> int | None:
        """Most tokens to generate; None: as many as fit."""
        new = self.max_completion_tokens
        return self.max_tokens if new is None else new

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report beside each token."""
        return (self.top_logprobs or 0) if self.logprobs else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
