#!/usr/bin/env python3
"""Fine-tunes a checkpoint with streaming attention in its lazy layers; `--help` says how. The same as `lt-gguf train`.

    accelerate launch --multi_gpu scripts/train_lt.py MODEL DATA.jsonl OUT --bf16

starts it on several devices, each with the whole model.
"""

from lt_gguf.cli.train import main

if __name__ == "__main__":
    main()
