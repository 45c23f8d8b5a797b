"""Short trainings on small images, method beside method."""
