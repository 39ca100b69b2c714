"""The chat page: one HTML file, with a policy by which it runs its own script only and reaches this server only."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import re

FILE = "chat.html"


@functools.cache
def chat_page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers.

    The policy names the hashes of the page's script and style, so that nothing else runs or is loaded, whatever a model
    answers; trusted types keep text from becoming HTML.
    """
    page = importlib.resources.files(__package__).joinpath(FILE).read_text("utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hash(page, "script"),
        "style-src": _hash(page, "style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return page.encode(), headers


def _hash(page: str, tag: str) -> str:
    """The source expression of the one element of a kind, see https://www.w3.org/TR/CSP3/#match-element-to-source-list."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
