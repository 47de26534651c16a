"""Guessing the next tokens cheaply, and checking many guesses with one evaluation of the model."""
