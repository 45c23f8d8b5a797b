"""What a run leaves behind, and how it goes on: checkpoints, records, and the flags it was started with."""
