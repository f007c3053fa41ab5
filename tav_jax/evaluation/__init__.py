"""Metrics of edited videos."""
