"""UMBRELLA: train LLaVA-style models that read brain MRI, and find out which training choices work.

Importing this package stays cheap: neither torch nor ray is loaded until a room that needs them is.
"""

__version__ = "0.1.0"
