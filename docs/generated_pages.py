"""The pages of the site that are generated from the code and from results.

One page per family of quantizers, the straight-through estimators, the recipes, the packed formats, negative results.
`site_hooks.py` adds them to the site.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitnet_experiments import report
from bitnet_experiments.sections import markdown_table
from bitnet_experiments.study import STUDIES, load_study, study_names
from bitnet_jax.quantization import recipes
from bitnet_jax.quantization.precision import Precision
from bitnet_jax.quantization.recipes import RECIPES
from bitnet_jax.quantization.registry import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS
from bitnet_jax.quantization.ste import ANNEALED, STES
from bitnet_kernels import FORMATS, pack

ROOT = Path(__file__).resolve().parent.parent


def generated_pages() -> dict[str, str]:
    """Page of the site -> its Markdown."""
    return {
        **method_pages(),
        "recipes.md": recipes_page(),
        "formats.md": formats_page(),
        "negative.md": negative_page(),
    }


def papers(text: str) -> str:
    """arXiv numbers become links."""
    return re.sub(r"(?<![\w./])(\d{4}\.\d{5})(?![\w.]*\d)", r"[\1](https://arxiv.org/abs/\1)", text)


# --- methods

FAMILIES = {
    "binary": "Binary weights",
    "ternary": "Ternary weights",
    "integer": "Integer weights",
    "activations": "Activations",
}


def method_pages() -> dict[str, str]:
    """One page per family of quantizers, and one of straight-through estimators."""
    entries: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for name, quantizer in WEIGHT_QUANTIZERS.items():
        precision = Precision(weight=name)
        facts = {
            "bits": f"{precision.weight_bits:.3g}",
            "packed format": f"`{precision.packed_format}`",
            "used by": _used_by("weight", name),
        }
        drawn = Precision(weight=name, weight_ste="clipped")
        entries[_family(name)].append(
            _method(name, quantizer, facts, lambda w, p=drawn: p.quantize_weight(w[None]))
        )
    for name, quantizer in ACTIVATION_QUANTIZERS.items():
        learned = not quantizer.measures_scale
        precision = Precision(
            weight="binary",
            activation=name,
            activation_ste="clipped" if quantizer.bits else "identity",
            activation_scale="learned" if learned else "analytic",
        )
        scales = (
            "learned" if learned else "measured" if quantizer.first_scale is None else "measured or learned"
        )
        facts = {
            "bits": f"{precision.activation_bits:.3g}",
            "scale": scales if quantizer.bits else "none",
            "used by": _used_by("activation", name),
        }
        scale = jnp.float32(1.0) if learned else None
        entries["activations"].append(
            _method(name, quantizer, facts, lambda x, p=precision, s=scale: p.quantize_activation(x, scale=s))
        )
    note = (
        "Generated from the registry (`bitnet_jax/quantization/registry.py`) and the docstrings of the functions. In "
        "the drawings the solid line is `codes * scale`, plus the minimum if there is one, for inputs from -2 to 2 "
        "whose mean absolute value is 1, the "
        "dashed line the gradient for an incoming gradient of 1, with the estimator `clipped`."
    )
    pages = {
        f"methods/{family}.md": "\n\n".join((f"# {FAMILIES[family]}", note, *parts))
        for family, parts in entries.items()
    }
    return pages | {"methods/gradients.md": gradients_page()}


def _family(name: str) -> str:
    """By the codes that a quantizer returns: two, three, or more."""
    row = jnp.linspace(-2, 2, 1001, dtype=jnp.float32)[None]
    codes = np.unique(Precision(weight=name).quantize_weight(row).codes)
    return {2: "binary", 3: "ternary"}.get(len(codes), "integer")


def _used_by(field: str, name: str) -> str:
    using = [
        recipe
        for recipe, value in RECIPES.items()
        if any(getattr(precision, field) == name for _, precision in _rules(value))
    ]
    return ", ".join(f"[`{recipe}`](../recipes.md)" for recipe in using) or "no named recipe"


def _method(name: str, entry: Any, facts: dict[str, str], quantize: Callable[..., Any]) -> str:
    function = entry.function
    arguments = ", ".join(f"{key}={value!r}" for key, value in dict(entry.fixed).items())
    call = f"`{function.__module__}.{function.__name__}`" + (f" with `{arguments}`" if arguments else "")
    lines = "\n".join(f"- {key}: {value}" for key, value in {**facts, "function": call}.items())
    return "\n\n".join((f"## {name}", docstring(function), lines, drawing(quantize)))


def docstring(function: Callable[..., Any]) -> str:
    """Prose as Markdown; from the first formula on, the lines as they stand."""
    text = inspect.cleandoc(function.__doc__ or "")
    prose, formula, rest = re.split(r"^(?=(Forward|Backward|Source):)|\Z", text, maxsplit=1, flags=re.M)
    parts = [papers(prose.strip())] if prose.strip() else []
    if formula:
        formulas, _, source = rest.partition("Source:")
        parts.append(f"```text\n{formulas.strip()}\n```")
        parts += [f"Source: {papers(' '.join(source.split()))}"] if source else []
    return "\n\n".join(parts)


def drawing(quantize: Callable[[jax.Array], Any]) -> str:
    """The staircase of a quantizer and its gradient."""
    x = jnp.linspace(-2, 2, 401, dtype=jnp.float32)

    def value(x: jax.Array) -> jax.Array:
        return quantize(x).dequantize().reshape(-1)

    y, backward = jax.vjp(value, x)
    (gradient,) = backward(jnp.ones_like(y))
    return svg(np.asarray(x), {"codes * scale": np.asarray(y), "gradient": np.asarray(gradient)})


def gradients_page() -> str:
    lines = [
        "# Straight-through estimators",
        "A quantizer's step has derivative zero almost everywhere; an estimator h(z) replaces it in the backward pass. "
        "Generated from `STES` in `bitnet_jax/quantization/ste.py`. Solid: h at the end of training; dashed, where "
        "the estimator is annealed: at half of it.",
    ]
    z = jnp.linspace(-2, 2, 401, dtype=jnp.float32)
    for name, function in STES.items():
        curves = {"end": jnp.broadcast_to(function(z, 1.0), z.shape)}
        if name in ANNEALED:
            curves["half"] = function(z, 0.5)
        drawn = svg(np.asarray(z), {key: np.asarray(value) for key, value in curves.items()})
        lines += [f"## {name}", papers(inspect.cleandoc(function.__doc__ or "")), drawn]
    return "\n\n".join(lines)


def svg(x: np.ndarray, curves: dict[str, np.ndarray]) -> str:
    """Curves over x as an inline picture; the first solid, the second dashed."""
    width, height = 360, 200
    low, high = (
        min(-1.0, *(float(y.min()) for y in curves.values())),
        max(1.0, *(float(y.max()) for y in curves.values())),
    )
    low, high = low - 0.15, high + 0.15

    def place(a: float, b: float) -> str:
        return f"{(a - x[0]) / (x[-1] - x[0]) * width:.1f},{(high - b) / (high - low) * height:.1f}"

    axes = "".join(
        f'<polyline points="{place(*a)} {place(*b)}" stroke="currentColor" stroke-opacity="0.3"/>'
        for a, b in (((x[0], 0), (x[-1], 0)), ((0, low), (0, high)))
    )
    numbers = ""
    for at, text in (((0.04, 1), "1"), ((1, 0), "1"), ((-1, 0), "-1")):
        left, top = place(*at).split(",")
        numbers += f'<text x="{left}" y="{top}" font-size="11" fill="currentColor">{text}</text>'
    drawn = "".join(
        f'<polyline points="{" ".join(place(a, b) for a, b in zip(x, y, strict=True))}" fill="none" '
        f'stroke="var(--md-accent-fg-color)" stroke-width="2" {dash}><title>{name}</title></polyline>'
        for (name, y), dash in zip(curves.items(), ("", 'stroke-dasharray="5 4"'), strict=False)
    )
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{axes}{numbers}{drawn}</svg>'


# --- recipes


def _rules(recipe: Any) -> Sequence[tuple[str, Precision]]:
    return (("*", recipe),) if isinstance(recipe, Precision) else recipe


def recipe_comments() -> dict[str, str]:
    """What the source says of each recipe: the comment above its group, and that on its line."""
    found, group = {}, ""
    for line in inspect.getsource(recipes).partition("\nRECIPES")[2].partition("\n}")[0].splitlines():
        if comment := re.fullmatch(r"    # (.*)", line):
            group = comment[1]
        elif entry := re.match(r'    "([^"]+)": .*?(?:  # (.*))?$', line):
            found[entry[1]] = "; ".join(text for text in (group, entry[2]) if text)
    return found


def recipes_page() -> str:
    """One line per recipe, or per rule of a recipe that treats layers differently."""
    comments = recipe_comments()
    header = [
        "recipe",
        "<layers",
        "<weights",
        "bits",
        "<gradient",
        "<scale",
        "<activations",
        "bits",
        "<gradient",
    ]
    header += ["<also", "<where it comes from"]
    shown = (
        "weight",
        "activation",
        "weight_ste",
        "activation_ste",
        "scale",
        "granularity",
        "activation_scale",
    )
    plain = Precision()
    lines = []
    for name, recipe in RECIPES.items():
        for pattern, p in _rules(recipe):
            others = {field: getattr(p, field) for field in vars(plain) if field not in shown}
            also = ", ".join(
                f"{key}={value}" for key, value in others.items() if value != getattr(plain, key)
            )
            weight = [f"`{p.weight}`", f"{p.weight_bits:.3g}"]
            weight += [p.weight_ste, f"{p.scale} per {_granularity(p)}"] if p.quantizes_weights else ["", ""]
            quantized = p.activation != "none"
            activation = [f"`{p.activation}`" if quantized else "float", f"{p.activation_bits:.3g}"]
            activation += [p.activation_ste if quantized else ""]
            if p.activation_scale == "learned":
                activation[0] += ", learned scale"
            source = papers(comments.get(name, ""))
            lines.append([f"`{name}`", f"`{pattern}`", *weight, *activation, also, source])
    text = (
        "# Recipes\n\nEvery name that `model.precision` of a config takes, generated from "
        "`bitnet_jax/quantization/recipes.py`. A recipe with several lines gives each group of layers its own "
        "precision; the first pattern that matches a layer wins. The output head stays float32 unless a rule names "
        "it. Fields may differ by name: `bnn(activation_ste=approx_sign)`. The quantizers are on the pages "
        "[binary](methods/binary.md), [ternary](methods/ternary.md), [integer](methods/integer.md) and "
        "[activations](methods/activations.md), the gradients under "
        "[straight-through estimators](methods/gradients.md).\n\n"
    )
    return text + markdown_table(header, lines) + "\n"


def _granularity(precision: Precision) -> str:
    size = precision.granularity
    return f"group of {size}" if isinstance(size, int) else {"channel": "output channel"}.get(size, size)


# --- formats


def formats_page() -> str:
    """Bytes of each packed format, drawn; then the definition, from the page of the kernels."""
    definition = (ROOT / "kernels/README.md").read_text().partition("\n## The packed formats\n")[2]
    parts = [
        "# Packed formats",
        "How codes lie in bytes. The drawings are generated from `FORMATS` in `bitnet_kernels/packed.py`, and each "
        "example byte was made by `bitnet_kernels.pack`; the text below is that of [the kernels](kernels/README.md).",
        "| format | bits per code | codes per byte | codes | inputs per 64-byte block | layouts |\n"
        "|---|--:|--:|---|--:|---|",
    ]
    for name, form in FORMATS.items():
        codes = (
            ", ".join(map(str, form.values))
            if len(form.values) < 4
            else f"{form.values[0]} to {form.values[-1]}"
        )
        parts[-1] += (
            f"\n| `{name}` | {form.bits:.3g} | {form.fields} | {codes} | {form.block_k} | {', '.join(form.layouts)} |"
        )
    parts += ["## One byte of each format", *(byte_drawing(name) for name in FORMATS)]
    parts += ["## One block of panel16", block_drawing(), "## Definition", definition.partition("\n## ")[0]]
    return "\n\n".join(parts) + "\n"


def byte_drawing(name: str) -> str:
    """A byte with alternating codes: the fields from high to low, the code in each, and the byte itself."""
    form = FORMATS[name]
    values = [form.values[(5 * s + 2) % len(form.values)] for s in range(form.fields)]
    row = np.zeros((1, form.block_k), np.int8)
    row[0, ::4] = values  # field s of byte 0 holds input 4 s
    codes, one = jnp.asarray(row if 0 in form.values else np.where(row, row, 1)), jnp.ones((1, 1))
    packed = pack(codes, one, name, minimum=one if form.has_minimum else None)
    byte = int(packed.codes.reshape(-1)[0])
    bits = int(form.bits) if form.bits == int(form.bits) else 0
    cells = []
    for s in reversed(range(form.fields)):
        field = byte // form.base**s % form.base
        digits = f"{field:0{bits}b}" if bits else f"{field} × 3<sup>{s}</sup>"
        cells.append(f"<td>input {4 * s}<br><code>{digits}</code><br>{values[s]:+d}</td>")
    return (
        f'<table class="byte"><caption><code>{name}</code>: byte {byte} = <code>{byte:08b}</code></caption>'
        f"<tbody><tr>{''.join(cells)}</tr></tbody></table>"
    )


def block_drawing() -> str:
    """64 bytes: four neighbouring inputs of sixteen rows."""
    size, gap = 34, 3
    cells = "".join(
        f'<rect x="{(r % 8) * (4 * size / 2 + gap) + j * size / 2:.0f}" y="{r // 8 * (size + 22) + 16}" '
        f'width="{size / 2}" height="{size}" fill="var(--md-accent-fg-color)" fill-opacity="{0.2 + 0.2 * j:.1f}" '
        f'stroke="currentColor" stroke-opacity="0.4"/>'
        for r in range(16)
        for j in range(4)
    )
    names = "".join(
        f'<text x="{(r % 8) * (4 * size / 2 + gap):.0f}" y="{r // 8 * (size + 22) + 12}" font-size="11" '
        f'fill="currentColor">row {r}</text>'
        for r in range(16)
    )
    return f'<svg viewBox="0 0 570 116" width="570" role="img">{cells}{names}</svg>'


# --- results


def negative_page() -> str:
    """The studies with a claim that did not hold, or not fully: their verdict, and what their page says about it."""
    left_out = ("reproduced", "own finding")
    verdicts = {
        name: STUDIES / name / "verdict.json" for name in study_names()
    }  # none before the first result
    judged = {name: json.loads(file.read_text()) for name, file in verdicts.items() if file.is_file()}
    studies = [load_study(name) for name, found in judged.items() if found["verdict"] not in left_out]
    lines = [
        "# Negative results",
        "Claims of the literature that did not hold here, or only in part, at the sizes that two CPU cores can train. "
        "Generated from the verdicts and results of [the studies](experiments/README.md).",
        report.index(studies).replace("](studies/", "](experiments/studies/"),
    ]
    for study in studies:
        text = (study.folder / "README.md").read_text()
        begin, end = report.VERDICT
        verdict = text.partition(begin)[2].partition(end)[0].strip()
        discussion = text.partition("\n## Discussion\n")[2].partition("\n## ")[0].strip()
        links = {
            "](../../": "](experiments/",
            "](../": "](experiments/studies/",
            "](claims.png": f"](experiments/studies/{study.name}/claims.png",
        }
        for old, new in links.items():
            verdict, discussion = verdict.replace(old, new), discussion.replace(old, new)
        lines += [f"## {study.question}", verdict, discussion]
    return "\n\n".join(lines) + "\n"
