"""Templates of what language models are asked; data of the package, one file each."""
