"""The native library and what runs on it.

`library` finds and loads it, `api` binds its C API, `llama` is the `Llama` class, `rewinding` what it does when it goes back
(with `snapshots` of streaming layers and `prompts` that say what to read again), `turns` how threads share it, `lazy_ratios`
measures a prompt. `reading_ahead` reads the beginning of a prompt before its rest is known, `kept_states` keeps that on disk
(`state_store` is the folder, `state_file` a file in it, `disk_cache` the same for llama-cpp-python's API). `cpu` says how many cores
there are for it, `context_size` how large a context can be, `crash` what is said when native code dies, `supervised` starts
programs that end with this one, and `self_check` says which kinds of weights work on this machine.
"""
