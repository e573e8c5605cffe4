"""What is timed, and against whom: `lt-gguf bench`. `measure.py` says in which order, `worker.py` is the process that is timed."""
