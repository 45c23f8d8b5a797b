"""RWP for `transformers.Trainer`."""
