"""Models edgellm knows by name."""
