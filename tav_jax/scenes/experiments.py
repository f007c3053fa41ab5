"""The former name of `python -m tav_jax.worlds.experiments`."""

import sys

from tav_jax.worlds.experiments import main

if __name__ == "__main__":
    sys.exit(main())
