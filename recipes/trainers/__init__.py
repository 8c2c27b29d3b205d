"""Trainer classes of the recipes."""
