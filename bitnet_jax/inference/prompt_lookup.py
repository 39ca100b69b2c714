"""Prompt look-up: drafts the next tokens from an earlier occurrence of the last ones, in the prompt or the text.

A pass of the model over the last token and N drafted ones yields the logits of all N + 1 positions, in less time than
N + 1 passes over one token. Tokens are chosen from them one after another, each with the key of its position, and
as long as the draft foresaw them. So the text does not depend on the drafts: it is that of plain decoding, greedy or
sampled, wherever the logits of a position do not depend on the number of positions of a pass. A draft needs no second
model and no training (Saxena, "Prompt Lookup Decoding", 2023; the acceptance of drafts in general: 2211.17192).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

SHORTEST, LONGEST = 2, 3  # tokens that are looked up


def draft(text: Int[Array, "R"], last: Int[Array, ""], count: int) -> tuple[Int[Array, "N"], Bool[Array, ""]]:
    """The tokens that followed the newest of the longest earlier occurrences of the last tokens.

    Args:
      text: the tokens up to the place `last`; what is behind it is not read.
      count: N. If fewer tokens follow the occurrence, they are repeated.

    Returns:
      the draft, and whether there was an earlier occurrence of at least SHORTEST tokens; else it means nothing.
    """
    places = jnp.arange(text.shape[0], dtype=jnp.int32)
    matches = places < last
    length = jnp.zeros_like(places)  # of the common suffix with the text, up to LONGEST
    for n in range(LONGEST):
        matches &= (jnp.roll(text, n) == text[last - n]) & (places >= n)
        length += matches.astype(jnp.int32)
    best = jnp.argmax(jnp.where(length > 0, length * text.shape[0] + places, 0)).astype(jnp.int32)
    following = best + 1 + jnp.arange(count, dtype=jnp.int32) % jnp.maximum(last - best, 1)
    return text[following], length[best] >= SHORTEST
