"""Recipes and the command line; each module is a script of its own."""
