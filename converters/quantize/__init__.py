"""Which ggml type each tensor gets, and the bytes it then has."""
