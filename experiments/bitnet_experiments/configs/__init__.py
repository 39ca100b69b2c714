"""Run configs with line-by-line comments, one file per problem: `bitnet-jax train --config NAME[:VARIANT]`.

`bitnet-jax init NAME` copies one for editing. A config may import another one from `bitnet_experiments.configs`, but
not from a folder of the repository, so that its copy runs anywhere.
"""
