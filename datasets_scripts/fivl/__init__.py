"""Grounded samples: key expressions of answers with their masks."""
