"""Sweeps: search space, Ray Tune, and the answer."""
