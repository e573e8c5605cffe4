#!/usr/bin/env python3
"""Converts a Hugging Face checkpoint to a hybrid GGUF file; `--help` says how. The same as `lt-gguf convert`."""

from lt_gguf.cli.convert import main

if __name__ == "__main__":
    main()
