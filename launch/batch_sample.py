#!/usr/bin/env python
"""Sample a plan of runs, prompts and seeds. `python -m tav_jax.batch --help` has the plan's form.

python launch/batch_sample.py plan.yaml --workers 8
"""

import sys

from tav_jax.batch import main

if __name__ == "__main__":
    sys.exit(main())
