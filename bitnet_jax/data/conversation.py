"""How a prompt begins, which tokens end an answer, and the chat template."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What a model file says about prompts; nothing in it is derived from the text of a token."""

    begin: tuple[int, ...] = ()  # ids before each prompt
    end: tuple[int, ...] = ()  # ids that end an answer
    template: str | None = None  # Jinja source that formats messages
