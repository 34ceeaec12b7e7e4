"""A checkpoint that is run over many conversations by the processes of Ray."""
