"""Begin and end tokens and the chat template of a Hugging Face folder.

Each from the first file that states it:

    end        generation_config.json, then config.json: eos_token_id, one id or a list, all of them
               tokenizer_config.json: eos_token
    begin      tokenizer.json: post_processor, if it writes tokens
               tokenizer_config.json: bos_token, if add_bos_token is true
    template   chat_template.jinja
               tokenizer_config.json: chat_template, a text, or a list of named ones: the one named default

The variables of the template are the tokens that tokenizer_config.json names.

Sources: generation stops at the ids of generation_config.json, which is derived from config.json where it is missing
(transformers, generation/configuration_utils.py). With a tokenizer.json, transformers 5 uses its post-processor and
ignores `add_bos_token` (tokenization_utils_base.py, _from_pretrained); transformers 4 rebuilt the post-processor of
Llama and Gemma tokenizers from `add_bos_token`. Published folders that state both agree; some whose post-processor
writes no tokens (`ByteLevel`) have `add_bos_token: true`, which is obeyed here. A chat_template.jinja precedes the
template in tokenizer_config.json (the same function).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitnet_jax.data.conversation import MAX_TEMPLATE, Conversation
from bitnet_jax.data.errors import DataError, one_line
from bitnet_jax.data.files import JSON_BYTES, decode, parse_json, read_file
from bitnet_jax.data.tokenizers import JsonTokenizer, Tokenizer
from bitnet_jax.interop.safetensors_folder import read_json

CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read(folder: str | Path, vocab_size: int, tokenizer: Tokenizer | None) -> Conversation:
    """The conversation that a folder states; tokens that it does not state are absent.

    Args:
      vocab_size: number of tokens of the model; every id must be below it.
      tokenizer: of tokenizer.json; None: the folder has none, and named tokens have no ids.

    Raises:
      ValueError: a damaged file, a field of the wrong type, an id outside the vocabulary, a token that the tokenizer
        does not have, or tokens added after a text; the message names the file and the field.
    """
    folder = Path(folder)
    settings = _optional(folder / TOKENIZER_CONFIG)
    named = {name: _token_text(settings, name) for name in NAMED}

    def token_id(name: str) -> tuple[int, ...]:
        """Of a token that tokenizer_config.json names."""
        text = named[name]
        if text is None or not isinstance(tokenizer, JsonTokenizer):
            return ()
        if (found := tokenizer.token_id(text)) is None:
            raise DataError(
                f"{TOKENIZER_CONFIG}: {name}: got {text[:80]!r}, expected a token of {TOKENIZER}; correct it"
            )
        return _checked_ids((found,), vocab_size, f"{TOKENIZER_CONFIG}: {name}")

    end = _stated_ends(folder, vocab_size)
    begin = _written_begin(folder, vocab_size)
    if begin is None:
        if _flag(settings, "add_eos_token"):
            raise DataError(
                f"{TOKENIZER_CONFIG}: add_eos_token is true: an end token after every text is not supported; "
                "set it to false"
            )
        begin = ()
        if _flag(settings, "add_bos_token"):
            if named["bos_token"] is None:
                raise DataError(
                    f"{TOKENIZER_CONFIG}: add_bos_token is true without a bos_token; name the token, or set it "
                    "to false"
                )
            begin = token_id("bos_token")
    return Conversation(
        begin=begin,
        end=token_id("eos_token") if end is None else end,
        template=_template(folder, settings),
        special_tokens=tuple((name, text) for name, text in named.items() if text is not None),
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _flag(settings: dict[str, Any], name: str) -> bool:
    value = settings.get(name)
    if not isinstance(value, bool | None):
        raise DataError(f"{TOKENIZER_CONFIG}: {name}: got {str(value)[:80]!r}, expected true or false")
    return bool(value)


def _checked_ids(ids: Any, vocab_size: int, where: str) -> tuple[int, ...]:
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise DataError(
                f"{where}: got {str(i)[:80]!r}, expected token ids from 0 to {vocab_size - 1}, the model's vocabulary"
            )
    return tuple(dict.fromkeys(ids))


def _stated_ends(folder: Path, vocab_size: int) -> tuple[int, ...] | None:
    """The ids of generation_config.json or config.json; None: neither states any."""
    for file in (GENERATION, CONFIG):
        value = _optional(folder / file).get("eos_token_id")
        if value is not None:
            return _checked_ids(
                value if isinstance(value, list) else [value], vocab_size, f"{file}: eos_token_id"
            )
    return None


def _token_text(settings: dict[str, Any], name: str) -> str | None:
    """The text of a named token, written as a string or as an object with its content."""
    value = settings.get(name)
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str | None) or (isinstance(value, dict) and text is None):
        raise DataError(
            f"{TOKENIZER_CONFIG}: {name}: got {str(value)[:80]!r}, expected text, or an object with text as content"
        )
    return text


def _written_begin(folder: Path, vocab_size: int) -> tuple[int, ...] | None:
    """The ids that the post-processor of tokenizer.json writes before a text; None: it writes no tokens."""
    before, after = written_around(folder, vocab_size)
    if after:
        raise DataError(
            f"{TOKENIZER}: post_processor: adds the tokens {list(after)} after every text, expected tokens before it "
            "only; remove them"
        )
    return before


def written_around(folder: Path, vocab_size: int) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """The ids that the post-processor of tokenizer.json writes before a text (None: it writes no tokens), and after it.

    Raises DataError: a damaged file, or a processor of another structure.
    """
    path = folder / TOKENIZER
    if not path.exists():
        return None, ()
    content = parse_json(decode(read_file(path, JSON_BYTES), TOKENIZER), TOKENIZER, "a complete file")
    where = f"{TOKENIZER}: post_processor"
    try:
        before, after = _written_around(content.get("post_processor"), where)
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: got an unknown structure ({one_line(error)}); save the tokenizer again"
        ) from error
    checked = None if before is None else _checked_ids(before, vocab_size, where)
    return checked, _checked_ids(after, vocab_size, where)


def _written_around(processor: Any, where: str) -> tuple[list[int] | None, list[int]]:
    """The ids before (None: no processor writes tokens) and after a single text."""
    if processor is None:
        return None, []
    several = processor["processors"] if processor["type"] == "Sequence" else [processor]
    writing = [one for one in several if one["type"] != "ByteLevel"]  # which changes offsets only
    if not writing:
        return None, []
    if len(writing) > 1 or writing[0]["type"] != "TemplateProcessing":
        kinds = ", ".join(str(one["type"])[:40] for one in writing)
        raise DataError(f"{where}: got {kinds}, expected TemplateProcessing, ByteLevel or both")
    before: list[int] = []
    after: list[int] = []
    side = before
    for piece in writing[0]["single"]:
        if "Sequence" in piece:
            side = after
        else:
            side += writing[0]["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return before, after


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / TEMPLATE
    if path.exists():
        return decode(read_file(path, 4 * MAX_TEMPLATE), str(path))
    value = settings.get("chat_template")
    if isinstance(value, list):
        if not all(
            isinstance(one, dict)
            and isinstance(one.get("name"), str)
            and isinstance(one.get("template"), str)
            for one in value
        ):
            raise DataError(
                f"{TOKENIZER_CONFIG}: chat_template: got a list of other things, expected objects with name and "
                "template"
            )
        value = {one["name"]: one["template"] for one in value}.get("default")
    if not isinstance(value, str | None):
        raise DataError(
            f"{TOKENIZER_CONFIG}: chat_template: got {type(value).__name__}, expected text, or a list of named texts"
        )
    return value
