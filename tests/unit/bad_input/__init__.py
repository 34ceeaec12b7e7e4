"""Broken inputs of every kind, each with what a person is told about it."""
