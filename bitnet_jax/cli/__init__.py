"""The `bitnet-jax` command: main.py, and one module per sub-command."""
