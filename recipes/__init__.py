"""The recipes: scripts in a checkout, `hf_rwp.recipes` where the package is installed."""
