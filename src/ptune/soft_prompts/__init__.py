"""The trained result, and its files."""
