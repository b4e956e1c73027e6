"""The tokenizer of a checkpoint folder: prompts and chats to tokens, tokens to text and bytes.

transformers reads the folder and renders the chat template (in its sandbox); the `tokenizers`
object inside does the rest, since it may be used from several threads. Only files of the folder are
read, and no code in them is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..search_spaces.records import read_bounded

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class ChatText:
    """Text in and out of token ids, for one checkpoint."""

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401 - transformers types it loosely
        """Wrap a fast tokenizer of transformers.

        Raises:
            ValueError: it has no `tokenizers` object.
        """
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer must be a fast one, but {type(tokenizer).__name__} is not: save "
                "`tokenizer.json` with transformers' `save_pretrained` into the checkpoint's folder"
            )
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # Set once here: changing them later would clash with other threads.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._added = {
            token_id: token.content
            for token_id, token in self._backend.get_added_tokens_decoder().items()
        }
        self._is_byte_level = "ByteLevel" in _decoder_types(self._backend)
        self._bytes: dict[int, bytes] = {}

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's own end-of-sequence token; empty without one."""
        token_id = self._tokenizer.eos_token_id
        return () if token_id is None else (int(token_id),)

    @property
    def num_token_ids(self) -> int:
        """Every token id of a prompt is below this."""
        return 1 + max(self._tokenizer.get_vocab().values(), default=-1)

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder says how to write a conversation."""
        return bool(self._tokenizer.chat_template)

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Tokens of a plain prompt, with what the model wants around it (a start token)."""
        return tuple(self._backend.encode(prompt, add_special_tokens=True).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Tokens of a conversation up to where the assistant's answer starts.

        Raises:
            ValueError: no template, or one that refuses these messages.
        """
        if not self.has_chat_template:
            raise ValueError(
                "the checkpoint has no chat template: use /v1/completions, or give the server "
                "--chat-template, or add `chat_template.jinja` to its folder"
            )
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as err:
            raise ValueError(
                f"the chat template of this model refuses these messages: {err}"
            ) from err
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of some tokens, special ones left out."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, special ones written out; empty for unknown ids."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._token_bytes(token_id)
        return self._bytes[token_id]

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._is_byte_level and all(character in _BYTE_OF for character in piece):
            return bytes(_BYTE_OF[character] for character in piece)
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("\u2581", " ").encode()


def load_chat_text(folder: Path, template: Path | None = None) -> ChatText | None:
    """The tokenizer of a folder; None when the folder has none.

    Args:
        folder: with `tokenizer.json` or `tokenizer.model`.
        template: a file with a chat template, instead of the folder's own.

    Raises:
        ValueError: it cannot be read, wants code of its own to be run, or is no fast tokenizer; or
            the template is none.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (ValueError, OSError, KeyError, ImportError) as err:
        raise ValueError(f"{folder}: the tokenizer cannot be loaded: {err}") from err
    if template is not None:
        _set_template(tokenizer, template)
    return ChatText(tokenizer)


def _set_template(tokenizer: Any, file: Path) -> None:  # noqa: ANN401 - transformers types it loosely
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        tokenizer.chat_template = read_bounded(file).decode()
    except (OSError, UnicodeDecodeError) as err:
        raise ValueError(
            f"{file}: the chat template cannot be read ({err}); check the path"
        ) from err
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except TemplateSyntaxError as err:
        raise ValueError(f"{file}, line {err.lineno}: no chat template in Jinja: {err}") from err
    except TemplateError:
        pass  # it refuses this conversation, which clients are told of theirs


def _decoder_types(backend: Any) -> set[str]:  # noqa: ANN401
    """Names of a tokenizer's decoding steps."""
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    return {str(step.get("type")) for step in steps}


def _byte_alphabet() -> dict[str, int]:
    """The characters in which byte-level vocabularies write bytes.

    Printable bytes are written as themselves, all others, in order, as the characters from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
