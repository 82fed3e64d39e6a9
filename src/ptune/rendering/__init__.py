"""A record in a template to a row of ids, and rows to batches."""
