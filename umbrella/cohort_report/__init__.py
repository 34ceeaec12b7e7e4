"""For looking at data before it is used: a report of a whole cohort, and one conversation as the model gets it."""
