"""A frozen language model: how it is loaded, what makes its logits and its loss."""
