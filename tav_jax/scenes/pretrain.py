"""The former name of `python -m tav_jax.worlds.pretrain`."""

import sys

from tav_jax.worlds.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
