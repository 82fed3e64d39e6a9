"""One forward pass at less cost, the same numbers."""
