"""A frozen model that knows virtual tokens, and the same with a prompt encoder."""
