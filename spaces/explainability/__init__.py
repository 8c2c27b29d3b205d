"""The explainability Space."""
