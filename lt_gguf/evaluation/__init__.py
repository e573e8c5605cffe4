"""Measures what a hybrid loses: tasks that need the far context, perplexity, and how far it is from the full model."""
