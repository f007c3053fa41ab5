"""Drawn scenes of 64x64: jointed figures, what they do, where, and in which style."""
