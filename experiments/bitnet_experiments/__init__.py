"""Experiments on top of bitnet_jax: run configs, studies, sweeps and reports."""
