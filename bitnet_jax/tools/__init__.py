"""Checks and measurements of models and kernels on this machine."""
