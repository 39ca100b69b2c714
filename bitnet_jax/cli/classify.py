"""Classify texts: the most likely label of each, and its probability. The same command as `bitnet-jax predict`.

Without INPUT, each line of --file or of standard input is a text, cut to the length that the model was trained with.
Output lines are label, probability and text, separated by tabs.

example:
  bitnet-jax classify runs/text-packed "return a value" --json answers.json
  bitnet-jax classify runs/text-packed --format jsonl < lines.txt > answers.jsonl
"""

from __future__ import annotations

from bitnet_jax.cli.predict import add_arguments, run

__all__ = ["add_arguments", "run"]
