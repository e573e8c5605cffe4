"""GGUF files: their metadata, what they say of a model, and how its streaming layers are written into one."""
