"""The embedded cohort: brain volumes with effects of known size, made from a template."""
