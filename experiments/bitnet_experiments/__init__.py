"""What experiments are made of and installs with bitnet_jax: the configs of their runs."""
