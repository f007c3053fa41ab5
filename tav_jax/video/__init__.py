"""Video and image files."""

from tav_jax.video.read import read_frames as read_frames
