"""What a model says about prompts: its begin and end tokens, and its chat template.

Models of others state them in their files (interop/huggingface_conversation.py); for a model trained here they follow
from the documents it was trained on (`of_documents`).

conversation.json   in a packed folder (packed/storage.py)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitnet_jax.data.errors import DataError
from bitnet_jax.data.files import parse_json
from bitnet_jax.data.tokenizers import Tokenizer

CONVERSATION = "conversation.json"
MAX_TEMPLATE = 1 << 18  # characters; published chat templates have at most about 20,000
RESERVED = ("messages", "add_generation_prompt", "tools", "documents")  # variables of every chat template


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Begin and end tokens and the chat template of a model; nothing is derived from the text of a token."""

    begin: tuple[int, ...] = ()  # ids before the first token of a text
    end: tuple[int, ...] = ()  # ids that end an answer, any one of them
    template: str | None = None  # Jinja source that formats messages, see chat_template.py
    special_tokens: tuple[
        tuple[str, str], ...
    ] = ()  # variables of the template, such as ("bos_token", "<s>")
    # Whether `begin` also precedes a prompt that is continued. False for a model trained here: its training windows
    # begin anywhere in a document, so a prompt may be the middle of one.
    begins_prompts: bool = True

    def __post_init__(self) -> None:
        for name in ("begin", "end"):
            ids = getattr(self, name)
            if not isinstance(ids, tuple) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
                raise DataError(f"{name}: got {str(ids)[:80]}, expected token ids from 0 to 2**31 - 1")
        if not isinstance(self.template, str | None):
            raise DataError(f"template: got {type(self.template).__name__}, expected text or null")
        if self.template is not None and len(self.template) > MAX_TEMPLATE:
            raise DataError(
                f"template: got {len(self.template)} characters, expected at most {MAX_TEMPLATE}; remove it"
            )
        for pair in self.special_tokens:
            name, text = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, None)
            if not isinstance(name, str) or not name.isidentifier() or name in RESERVED:
                raise DataError(f"special_tokens: got {str(pair)[:80]}, expected names such as bos_token")
            if not isinstance(text, str):
                raise DataError(f"special_tokens: {name}: got {str(text)[:80]}, expected text")
        if type(self.begins_prompts) is not bool:
            raise DataError(f"begins_prompts: got {str(self.begins_prompts)[:80]}, expected true or false")

    @property
    def template_tokens(self) -> dict[str, str]:
        """The special tokens whose names occur in the template."""
        return {name: text for name, text in self.special_tokens if name in (self.template or "")}

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises DataError if a begin or end id is not a token of a model with `vocab_size` tokens."""
        for name in ("begin", "end"):
            if outside := [i for i in getattr(self, name) if i >= vocab_size]:
                raise DataError(
                    f"{name}: got the id {outside[0]}, expected ids below {vocab_size}, the model's vocabulary"
                )

    def to_json(self) -> str:
        fields = dataclasses.asdict(self) | {"special_tokens": dict(self.special_tokens)}
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Conversation:
        """The inverse of `to_json`. Raises DataError: another kind of file, or damaged."""
        fields = parse_json(text, CONVERSATION, "the file written with the model")
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or fields.keys() != known:
            raise DataError(f"{CONVERSATION}: got other fields, expected {', '.join(sorted(known))}")
        try:
            return cls(
                begin=_tuple(fields["begin"]),
                end=_tuple(fields["end"]),
                template=fields["template"],
                special_tokens=tuple(_object(fields["special_tokens"]).items()),
                begins_prompts=fields["begins_prompts"],
            )
        except DataError as error:
            raise DataError(f"{CONVERSATION}: {error}") from error


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"special_tokens: got {type(value).__name__}, expected an object of names and texts")
    return value


def of_documents(tokenizer: Tokenizer | None) -> Conversation:
    """Of a model trained on a stream of documents, see streams.py: the separator is before and after each of them."""
    if tokenizer is None or tokenizer.eos_id is None:
        return Conversation()
    separator = (tokenizer.eos_id,)
    return Conversation(begin=separator, end=separator, begins_prompts=False)


def prompt_ids(tokenizer: Tokenizer, conversation: Conversation, text: str) -> np.ndarray:
    """int32 [T]: the tokens of a prompt to continue, after the begin tokens if prompts have them."""
    begin = conversation.begin if conversation.begins_prompts else ()
    return with_begin(begin, tokenizer.encode(text))


def with_begin(begin: Sequence[int], ids: np.ndarray) -> np.ndarray:
    """int32 [len(begin) + T]: begin tokens, then the tokens of a text."""
    return np.concatenate([np.array(begin, np.int32), ids])
