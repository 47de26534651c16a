"""Messages to prompts, and conversations that keep what the model has already read."""
