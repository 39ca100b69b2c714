"""The `bitnet-jax` command: main.py, and one module for each command."""
