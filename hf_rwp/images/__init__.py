"""Images: where they come from, how they are loaded and changed, and how often a model is right about them."""
