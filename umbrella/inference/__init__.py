"""A trained model that answers questions about volumes."""
