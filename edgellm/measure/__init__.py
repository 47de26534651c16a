"""What a model's answers are worth: perplexity, and how far a quantized model is from its original."""
