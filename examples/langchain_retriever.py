"""A LangChain retriever finds what a question is about, and `lt-gguf serve` answers from it.

    lt-gguf serve smollm2 --port 8080
    python examples/langchain_retriever.py http://127.0.0.1:8080/v1 "What was sold?" notes/*.md

Needs langchain-openai. What is retrieved stands first in the prompt, so that several questions about the same pieces read them once.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from pathlib import Path

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough
from langchain_openai import ChatOpenAI


class WordRetriever(BaseRetriever):
    """The pieces that share the question's rarest words: enough for an example, and without another model."""

    pieces: list[Document]
    k: int = 4

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        words = [set(re.findall(r"\w+", piece.page_content.lower())) for piece in self.pieces]
        frequency = Counter(word for piece in words for word in piece)
        asked = set(re.findall(r"\w+", query.lower()))
        scores = [sum(math.log(1 + len(words) / frequency[word]) for word in asked & piece) for piece in words]
        best = sorted(range(len(words)), key=lambda i: -scores[i])[: self.k]
        return [self.pieces[i] for i in sorted(best) if scores[i] > 0]  # in their order: the same ones are the same prompt


def paragraphs(files: list[Path]) -> list[Document]:
    texts = [(file, part.strip()) for file in files for part in re.split(r"\n\s*\n", file.read_text(encoding="utf-8"))]
    return [Document(part, metadata={"source": file.name}) for file, part in texts if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="of lt-gguf serve, with /v1")
    parser.add_argument("question")
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--key", default="none", help="the server's API key, if it has one")
    parser.add_argument("--n-predict", type=int, default=200)
    options = parser.parse_args()

    model = ChatOpenAI(base_url=options.address, api_key=options.key, model="any", temperature=0, max_tokens=options.n_predict)
    prompt = ChatPromptTemplate.from_template("{context}\n\nAnswer from the text above: {question}")
    context = WordRetriever(pieces=paragraphs(options.files)) | (lambda found: "\n\n".join(piece.page_content for piece in found))
    chain = {"context": context, "question": RunnablePassthrough()} | prompt | model | StrOutputParser()
    for piece in chain.stream(options.question):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
