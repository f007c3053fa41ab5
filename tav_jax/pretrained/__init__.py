"""Published checkpoints and their configs."""
