"""A trained model as a folder that timm and transformers load, its card, and the way to the Hub."""
