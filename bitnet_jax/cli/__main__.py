"""`python -m bitnet_jax.cli`."""

from bitnet_jax.cli.main import console

console()
