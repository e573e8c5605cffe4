"""Asks a document a question, and prints the answer as it comes.

    python examples/ask_document.py smollm2 report.pdf "What was sold?"

The document is read once: the next question about it is answered at once, tomorrow, too.
"""

from __future__ import annotations

import argparse
import sys

from lt_gguf import Llama, open_documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a GGUF file, smollm2, or a model on the hub")
    parser.add_argument("document", help="text, Markdown, HTML, PDF or DOCX")
    parser.add_argument("question")
    parser.add_argument("--n-predict", type=int, default=200)
    options = parser.parse_args()

    llm = Llama.from_pretrained(options.model, n_ctx="auto", flash_attn=True, verbose=False)

    def reading(done: int, total: int) -> None:
        print(f"\rread {done} of {total} tokens", end="\n" if done == total else "", file=sys.stderr, flush=True)

    conversation = open_documents(llm, options.document, n_predict=options.n_predict, temperature=0, progress=reading)
    conversation.ask(options.question, show=lambda piece: print(piece, end="", flush=True), progress=reading)
    print()
    print(f"{llm.n_read} tokens were read, {conversation.n_restored} came from the disk", file=sys.stderr)


if __name__ == "__main__":
    main()
