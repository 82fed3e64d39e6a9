"""Virtual tokens for scripts that hold a `transformers.Trainer`."""
