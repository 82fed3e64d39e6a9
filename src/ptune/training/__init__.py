"""A run, a search, a series: from settings and records to a soft prompt."""
