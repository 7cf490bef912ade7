"""The report of a comparison: does distillation help, by how much, and how surely."""
