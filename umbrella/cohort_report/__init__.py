"""Inspection of data before training: a report of a cohort, and views of single conversations."""
