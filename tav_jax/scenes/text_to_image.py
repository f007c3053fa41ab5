"""The former name of `python -m tav_jax.worlds.text_to_image`."""

import sys

from tav_jax.worlds.text_to_image import main

if __name__ == "__main__":
    sys.exit(main())
