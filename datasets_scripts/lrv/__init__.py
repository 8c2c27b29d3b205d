"""LRV-Instruction's released annotations joined with a local folder of images."""
