"""The phantom cohort: simulated brain volumes with effects of known size."""
