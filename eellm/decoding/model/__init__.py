"""A stage as decoding runs it: lean layers and heads over the model's own parameters, keys and values, captured steps."""
