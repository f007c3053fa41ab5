"""Former names of the commands in `tav_jax.worlds`."""
