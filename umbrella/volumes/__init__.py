"""From image files to arrays of a modality's grid, each decoded once."""
