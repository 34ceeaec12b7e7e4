"""Conversations: reading and validation of all accepted formats. Volumes are referenced, not read."""
