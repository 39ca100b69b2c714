"""Messages to a prompt by a model's chat template, which may come from a stranger.

A template is a Jinja program. It runs in Jinja's sandbox, which refuses access to Python's internals, and in a process
with limits, since a sandboxed program can still loop or fill the memory:

    characters of a template, of its output   conversation.MAX_TEMPLATE, MAX_OUTPUT
    processor time, memory                    SECONDS (Linux, macOS), MEMORY_BYTES (Linux)
    time                                      WALL_SECONDS

Starting the process takes about 0.1 s. The environment is that of transformers (utils/chat_template_utils.py), so that
a template gives the same text.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_jax.data import chat_template_process
from bitnet_jax.data.conversation import Conversation
from bitnet_jax.data.errors import DataError
from bitnet_jax.data.tokenizers import Tokenizer
from bitnet_jax.optional_packages import missing_package

MAX_OUTPUT = 1 << 20
SECONDS, WALL_SECONDS = 3, 60
MEMORY_BYTES = 1 << 28


def render(
    conversation: Conversation,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The text of messages, as transformers' `apply_chat_template(..., tokenize=False)`.

    Args:
      messages: objects with `role` (such as system, user, assistant) and `content`.
      add_generation_prompt: whether to end with the header of an answer.
      tools: functions that the model may call, in the form of OpenAI's API.

    Raises:
      DataError: no template; a syntax error or a failure in it, also one that it raises itself (for example because
        it does not support a system message); or a limit exceeded. The message is one line.
    """
    if conversation.template is None:
        raise DataError(
            "got a model without a chat template, expected one to format messages; give a plain prompt"
        )
    if importlib.util.find_spec("jinja2") is None:
        raise DataError(missing_package("jinja2"))
    request = {
        "template": conversation.template,
        "variables": dict(conversation.special_tokens)
        | {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None,
        },
        "max_output": MAX_OUTPUT,
        "seconds": SECONDS,
        "memory_bytes": MEMORY_BYTES,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(Path(chat_template_process.__file__))],
            input=json.dumps(request).encode(),
            capture_output=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            timeout=WALL_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"chat template: did not finish within {WALL_SECONDS} s; correct it") from error
    if done.returncode < 0:  # killed by a signal, as the limit of processor time does
        raise DataError(
            f"chat template: stopped after {SECONDS} s of processor time or {MEMORY_BYTES} bytes of memory "
            f"(signal {-done.returncode}); correct it"
        )
    if done.returncode:
        raise DataError(
            f"chat template: its process failed ({_printable(done.stderr.decode(errors='replace'))})"
        )
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise DataError(f"chat template: {_printable(answer['error'])}")
    return str(answer["text"])


def chat_ids(
    tokenizer: Tokenizer,
    conversation: Conversation,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> np.ndarray:
    """int32 [T]: the tokens of messages, ending with the header of an answer. Raises DataError: see `render`.

    The whole text is encoded at once, and special tokens that the template writes become single tokens. No begin
    tokens are added: the template writes those the model was trained with (as in transformers).
    """
    return tokenizer.encode(render(conversation, messages, tools=tools))


def _printable(text: str) -> str:
    """The last line of a message, without control characters: it may be the template's own."""
    lines = text.strip().splitlines() or ["no message"]
    return "".join(c if c.isprintable() else "?" for c in lines[-1])[:300]
