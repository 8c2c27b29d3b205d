"""Prompts and preference pairs about images, as SIMA, POVID and CSR publish them."""
