"""Four threads share one Llama, in a process of their own: a crash in native code ends it.

    python shared_llama_child.py FILE MODE OPERATIONS

Prints a line for each answer that isn't the one that a Llama of its own gives, and the number of operations.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.llama import load, text

N_THREADS, N_ANSWER = 4, 10
GREEDY = {"max_tokens": N_ANSWER, "temperature": 0}
PROMPTS = [text(n, seed) for seed, n in enumerate((30, 150, 300, 90))]


def whole(llm, prompt) -> str:
    return llm.create_completion(prompt, **GREEDY)["choices"][0]["text"]


def streamed(llm, prompt) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in llm(prompt, stream=True, **GREEDY))


def generated(llm, prompt) -> list[int]:
    tokens = llm.generate(prompt, temp=0)
    return [next(tokens) for _ in range(N_ANSWER)]


def abandoned(llm, prompt) -> str:
    return next(llm.create_completion(prompt, stream=True, **GREEDY))["choices"][0]["text"]


def chat(llm, prompt) -> str:
    messages = [{"role": "user", "content": " ".join(map(str, prompt[:20]))}]
    chunks = llm.create_chat_completion(messages, stream=True, **GREEDY)
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def ratios(llm, prompt) -> list[float]:
    return llm.lazy_ratios(prompt + PROMPTS[1], 2, 40, 16).tolist()


def state(llm, prompt) -> bool:
    llm.load_state(llm.save_state())  # not one moment: others come between
    return True


def reset(llm, prompt) -> bool:
    llm.reset()
    return True


def evaluated(llm, prompt) -> bool:
    llm.eval(prompt[:20])
    return True


def memory(llm, prompt) -> bool:
    llm.set_seed(len(prompt))
    return sum(llm.kv_bytes().values()) > 0 and (llm.streaming is None or llm.n_tokens <= llm.n_ctx())


OPERATIONS: list[Callable] = [whole, streamed, generated, abandoned, chat, ratios, state, reset, evaluated, memory]


def main(file: str, mode: str, n_operations: int) -> None:
    shared = load(file, mode)
    expected = {}
    for operation in OPERATIONS:
        for i, prompt in enumerate(PROMPTS):
            alone = load(file, mode)
            expected[operation, i] = operation(alone, prompt)
            alone.close()

    def work(seed: int) -> int:
        choose = random.Random(seed)
        for _ in range(n_operations // N_THREADS):
            operation, i = choose.choice(OPERATIONS), choose.randrange(len(PROMPTS))
            if (found := operation(shared, PROMPTS[i])) != expected[operation, i]:
                print(f"{operation.__name__} of prompt {i}: {found!r} instead of {expected[operation, i]!r}")
        return n_operations // N_THREADS

    sys.setswitchinterval(1e-4)
    with ThreadPoolExecutor(N_THREADS) as pool:
        print(sum(pool.map(work, range(N_THREADS))), "operations")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
