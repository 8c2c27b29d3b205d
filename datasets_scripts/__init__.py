"""Data set builders: one self-contained module each."""
