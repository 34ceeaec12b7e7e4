"""What Ray has its first processes import: see ``preload``. Importing this is all that it is for."""

from umbrella.training.preload import take

take()
