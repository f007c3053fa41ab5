"""Drawn scenes of 32x32: subjects, colours, backgrounds, styles and motions."""
