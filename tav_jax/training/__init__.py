"""The tuning step, what trains, checkpoints and memory."""
