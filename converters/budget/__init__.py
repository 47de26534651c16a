"""Which type each tensor gets so that a file stays within a budget of bytes, quality and speed."""
