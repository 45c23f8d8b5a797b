"""Plugins for other people's training programs, which find them by name."""
