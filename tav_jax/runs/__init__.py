"""The folder of a run: its settings, its files, and what is sampled from it."""
