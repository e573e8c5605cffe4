"""The native library and what runs on it.

`library` finds and loads it, `api` binds its C API, `llama` is the `Llama` class, `rewinding` what it does when it goes back
(with `snapshots` of streaming layers and `prompts` that say what to read again), `lazy_ratios` measures a prompt.
"""
