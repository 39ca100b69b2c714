"""Files of a report: text between markers, figures that carry a digest of what they show, self-contained HTML."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitnet_experiments.sections import Section
from bitnet_jax.optional_packages import missing_package

DIGEST = "Plotted"  # key of the PNG's text chunk


def replaced(old: str, text: str, begin: str, end: str) -> str:
    """`old` with `text` between its markers. Raises ValueError: no markers."""
    head, found, rest = old.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"got a README without {begin} and {end}; put them where the text belongs")
    return f"{head}{begin}\n{text}\n{end}{tail}"


def draw(part: Section, folder: Path) -> None:
    """Writes the figure of a section into a folder. Raises ValueError: matplotlib is not installed."""
    if part.draw is not None:
        try:
            import matplotlib
        except ImportError as error:
            raise ValueError(missing_package("matplotlib")) from error
        matplotlib.use("Agg")  # headless; must precede the import of pyplot
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        part.draw(axes)
        figure.savefig(folder / f"{part.figure}.png", dpi=120, metadata={DIGEST: digest(part.plotted)})
        plt.close(figure)


def digest(plotted: Any) -> str:
    """Of the plotted values at six significant digits; pixels differ between versions of matplotlib, values do not."""
    return hashlib.sha256(json.dumps(_rounded(plotted)).encode()).hexdigest()[:16]


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _rounded(one) for name, one in value.items()}
    if isinstance(value, str) or value is None:
        return value
    if hasattr(value, "tolist"):
        return _rounded(value.tolist())
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return "nan" if math.isnan(value) else f"{value:.6g}"


def digest_of(file: Path) -> str | None:
    """The digest in a PNG; None if the file is missing or has none."""
    content = file.read_bytes() if file.is_file() else b""
    place = 8  # after the signature: chunks of length, type, data and checksum
    while place + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        name, _, text = content[place + 8 : place + 8 + length].partition(b"\0")
        if kind == b"tEXt" and name == DIGEST.encode():
            return text.decode("latin-1")
        place += length + 12
    return None


def page(title: str, text: str, folder: Path) -> str:
    """Markdown as one HTML page, with the figures in `folder` embedded: it opens without a network.

    Raises:
      ValueError: the package markdown is not installed.
    """
    try:
        import markdown
    except ImportError as error:
        raise ValueError(missing_package("markdown")) from error

    def embed(match: re.Match[str]) -> str:
        file = folder / html.unescape(match[1])
        if not file.is_file():
            return match[0]
        return f'src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"'

    body = re.sub(
        r'src="([^":]+\.png)"', embed, markdown.markdown(text, extensions=["tables", "fenced_code", "toc"])
    )
    style = (
        "body{max-width:60em;margin:2em auto;padding:0 1em;font:16px/1.5 sans-serif}img{max-width:100%}"
        "table{border-collapse:collapse}td,th{padding:.2em .6em;border-bottom:1px solid #ccc}code{background:#eee}"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head><body>\n{body}\n</body></html>\n"
    )
