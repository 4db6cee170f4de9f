"""Small changes to large models: low-rank adapters, read and written in every layout that others use."""
