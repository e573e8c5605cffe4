"""Asks a document many questions, each as if it were the first: the document is read once.

python examples/many_questions.py smollm2 report.pdf questions.txt > answers.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lt_gguf import Llama, open_documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a GGUF file, smollm2, or a model on the hub")
    parser.add_argument("document")
    parser.add_argument("questions", type=Path, help="a question a line")
    parser.add_argument("--n-predict", type=int, default=100)
    options = parser.parse_args()

    llm = Llama.from_pretrained(options.model, n_ctx="auto", flash_attn=True, verbose=False)
    conversation = open_documents(llm, options.document, n_predict=options.n_predict, temperature=0)
    for question in filter(None, map(str.strip, options.questions.read_text(encoding="utf-8").splitlines())):
        answer = conversation.ask(question)
        print(json.dumps({"question": question, "answer": answer.text}, ensure_ascii=False), flush=True)
        print(f"read {answer.n_read} tokens for it", file=sys.stderr)
        conversation.undo()  # back to the end of the document, of which a snapshot is kept


if __name__ == "__main__":
    main()
