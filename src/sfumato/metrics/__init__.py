"""Metrics: whether what was drawn is what was asked for, as numbers with intervals."""
