"""Sweeps with Ray Tune: search space, trials, ranking and report."""
