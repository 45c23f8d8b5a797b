"""The optimizer wrapper: placement, noise, window, perturbation, passes, optimizer, in the order to read them."""
