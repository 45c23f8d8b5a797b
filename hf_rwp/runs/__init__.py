"""How a run is made of steps, what it leaves behind, and how it goes on: checkpoints, records, flags."""
