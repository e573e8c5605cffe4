"""The native library and what runs on it: `library` finds and loads it, `api` binds its C API, `llama` is the `Llama` class."""
