"""The program that renders a chat template within limits; chat_template.py starts it.

It reads a JSON request on standard input and writes {"text": ...} or {"error": ...}. It imports Jinja and the standard
library only, so that it starts fast.
"""

from __future__ import annotations

import datetime
import json
import sys
from typing import Any


def _limit(seconds: int, memory_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # not on this system: the time limit of the parent process remains
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # elsewhere the limit counts other things, or nothing
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def _environment() -> Any:
    """The environment of transformers: its block trimming, extensions, filters and functions."""
    import jinja2.ext  # render() reports a missing_package("jinja2") before it starts this program
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}...{% endgeneration %}` marks the answer in training data; here it is its content."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Jinja's own filter escapes characters for HTML."""
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment


def _render(template: str, variables: dict[str, Any], max_output: int) -> str:
    pieces, size = [], 0
    for piece in _environment().from_string(template).generate(**variables):
        size += len(piece)
        if size > max_output:
            raise ValueError(f"got an output of more than {max_output} characters; correct it")
        pieces.append(piece)
    return "".join(pieces)


def _describe(error: BaseException) -> str:
    """The reason in one line, with the line of the template for a syntax error."""
    line = getattr(error, "lineno", None)
    text = " ".join(str(error).split()) or type(error).__name__
    return f"line {line}: {text}" if line else f"{type(error).__name__}: {text}"


def main() -> None:
    request = json.load(sys.stdin.buffer)
    _limit(request["seconds"], request["memory_bytes"])
    try:
        answer = {"text": _render(request["template"], request["variables"], request["max_output"])}
    except MemoryError:
        answer = {"error": f"got more than {request['memory_bytes']} bytes of memory; correct it"}
    except Exception as error:  # a template can raise anything
        answer = {"error": _describe(error)}
    sys.stdout.buffer.write(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
