"""What a KV cache takes, and what fits into a budget."""
