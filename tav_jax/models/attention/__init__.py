"""Attention between frames: its scopes and its implementations."""
