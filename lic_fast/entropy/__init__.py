"""Entropy models in the place of CompressAI's."""
