"""Scores of answers by likelihood, and metrics over subjects."""
