"""A trained model examined on conversations that it has not seen: answers, controls, tables, a report."""
