"""What is trained: virtual tokens, and the encoders that give them."""
