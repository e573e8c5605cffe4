"""The torch side of lt-gguf: what needs transformers. Nothing outside this folder imports it."""
