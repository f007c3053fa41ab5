#!/usr/bin/env python
"""Samples a plan of runs x prompts x seeds; what exists is skipped, what was written is said.

    python launch/batch_sample.py plan.yaml                  # one process
    python launch/batch_sample.py plan.yaml --workers 8      # eight, each with a GPU of this host
    srun --ntasks 32 --gpus-per-task 1 python launch/batch_sample.py plan.yaml     # several hosts

A plan is YAML, every prompt and seed for every run:

    runs: [outputs/man-skiing, outputs/car-turn]
    prompts: ["a panda, cartoon style", "at sunset"]
    seeds: [0, 1]            # optional; the run's own seed by default
    guidance_scale: 12.5     # optional, as are negative_prompt, num_inference_steps,
    eta: 1.0                 # num_inv_steps, sampler, and use_inv_latent: false for random noise

or CSV, a video a line, with the columns run,prompt and any of seed and the settings above.

Any number of processes may do this with one plan at once, started together or one by one, on one
host or on several that share the runs' folders: each video is made by one of them. What a killed
one had begun, the others make, or the same command run again. Then plan.manifest.jsonl, beside the
plan, has a line for each video: run, prompt, seed, settings, path, bytes, SHA-256.
Each process samples on a GPU of its own, on one chip of a TPU host, which no second process can
share, or on the CPU, and loads a run's model once.
"""

import sys

from tav_jax.batch import main

if __name__ == "__main__":
    sys.exit(main())
