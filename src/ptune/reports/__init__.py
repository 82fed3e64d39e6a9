"""One HTML page on a soft prompt."""
