"""Flax modules; they know nothing of configs, files or devices."""
