"""The object a program holds: a loaded model that any thread may call."""
