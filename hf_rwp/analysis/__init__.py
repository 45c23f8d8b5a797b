"""How flat a trained network is, and pictures."""
