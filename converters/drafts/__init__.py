"""A small model made of a model's own blocks, taught to guess what that one says (torch, imported where it is used)."""
