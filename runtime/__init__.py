"""Models and processes: the transformers integration, and what stands between it and the tiers."""
