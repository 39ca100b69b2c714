"""Settings of runs, commented line by line, one file per problem: `bitnet-jax train --config NAME[:VARIANT]`.

`bitnet-jax init NAME` copies one to edit. A config may import another one by `bitnet_experiments.configs`, never a
folder of the repository, so that its copy runs anywhere.
"""
