"""Composed scenes with exact ground truth."""
