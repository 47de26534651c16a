"""Fine-tunes that are stored apart from their model: read, merged in float32, or exported for run time."""
