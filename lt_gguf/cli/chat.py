"""`lt-gguf chat`: talk with a model about documents, in the terminal or through a pipe."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from lt_gguf.cli import model
from lt_gguf.gguf.file import read_model
from lt_gguf.memory.kv import kv_memory
from lt_gguf.spec import StreamingSpec

if TYPE_CHECKING:
    from lt_gguf.chat.commands import Chat
    from lt_gguf.chat.screen import Screen
    from lt_gguf.chat.sessions import Sessions

STDIN = "-"
CacheLimit = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Most disk for what models have read, so that it isn't read again: those go first that weren't used for longest; "
        "0: nothing is kept. Else 4GiB.",
    ),
]


@model.takes_options(model.ChatOptions)
def chat(
    file: model.ModelOrDefault = None,
    documents: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DOCUMENT]...", help="Files to ask about: text, Markdown, HTML, PDF, DOCX; -: standard input."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="What the model is told first.")] = None,
    ask: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A question to answer; leaves after the last one.")] = None,
    session: Annotated[str | None, typer.Option(metavar="NAME", help="Takes this session up, or begins it, and keeps it.")] = None,
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Most tokens of an answer; -1: no limit.")] = -1,
    temperature: model.Temperature = model.DEFAULT_TEMPERATURE,
    plain: Annotated[bool, typer.Option("--plain", help="Lines only: no colours, nothing that moves; for screen readers.")] = False,
    cache_limit: CacheLimit = None,
    snapshot_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most memory for going back to an earlier message without reading all again; 0: none. Else 512MiB.",
        ),
    ] = None,
    *,
    options: model.ChatOptions,
) -> None:
    """Chat with a GGUF model about documents. Answers go to stdout, everything else to stderr. /help lists the commands."""
    from lt_gguf.chat.commands import Chat
    from lt_gguf.chat.conversation import Conversation
    from lt_gguf.chat.figures import describe_memory
    from lt_gguf.chat.sessions import Sessions
    from lt_gguf.documents import find_files
    from lt_gguf.runtime.kept_states import KeptStates
    from lt_gguf.runtime.log import captured_errors
    from lt_gguf.runtime.state_store import DEFAULT_LIMIT, StateStore

    limit = DEFAULT_LIMIT if cache_limit is None else model.size_of("--cache-limit", cache_limit)
    file, words = told_apart(file, documents or [])
    sessions = Sessions()
    has_session = session is not None and sessions.exists(session)
    # note: before the model is loaded, so that a wrong name doesn't take long
    paths = find_files([word for word in words if word != STDIN])
    file = model.find(file)
    with captured_errors(forward=options.verbose):
        llm = model.load(file, options, snapshot_limit)
        conversation = Conversation(llm, system, n_predict, temperature, KeptStates(llm, StateStore(limit=limit)))

        @cache
        def full_kv() -> int:
            described = read_model(file)
            full = StreamingSpec((), described.n_layer, cache_keep=llm.cache_keep)
            types: dict[str, Any] = {"type_k": llm.cache_types.k, "type_v": llm.cache_types.v, "flash_attn": options.flash_attn}
            return kv_memory(described.kv_shape, full, llm.n_ctx(), **types).total

        screen = make_screen(plain, STDIN in words, asks=not ask, sessions=sessions)
        talk = Chat(conversation, screen, sessions, full_kv, session)
        screen.say(f"{describe_memory(llm, full_kv)} · {model.describe_threads(llm.n_threads)} · context of {llm.n_ctx()} tokens")
        if "tokenizer.chat_template" not in llm.metadata:
            screen.say(f"the file has no chat template, using {llm.chat_format}")
        if screen.is_interactive and not ask:
            screen.say("/help lists the commands, /file PATH reads a document, Ctrl-C stops an answer, Ctrl-D leaves")
        if session is not None and has_session:
            must(talk, f"/load {session}")
        bring(talk, words, paths)
        for question in ask or []:
            must(talk, question)
        if not ask:
            talk.run()


def told_apart(file: str | None, documents: list[str]) -> tuple[str | None, list[str]]:
    """The model and the documents: where the first word can only be a document, the model is the default one."""
    from lt_gguf.documents import SUFFIXES

    if file is not None and (file == STDIN or (file.lower().endswith(SUFFIXES) and Path(file).is_file())):
        return None, [file, *documents]
    return file, documents


def bring(talk: Chat, words: list[str], paths: list[Path]) -> None:
    """The documents of the command line. Raises what `must` does."""
    from lt_gguf.chat.commands import one_line
    from lt_gguf.chat.conversation import DoesNotFitError
    from lt_gguf.documents import read_bytes

    try:
        if STDIN in words:
            if sys.stdin.isatty():
                talk.screen.say("the document is read from here until Ctrl-D at the beginning of a line")
            talk.attach([read_bytes(sys.stdin.buffer.read(), "standard input")])
        if paths:
            talk.open_files(paths)
    except (DoesNotFitError, ValueError, OSError) as error:
        if not talk.screen.is_interactive:
            raise
        talk.screen.say(f"error: {one_line(error)}")


def must(talk: Chat, line: str) -> None:
    """Does what a line asks for. Raises typer.Exit where it can't be done and nobody sits there to mend it."""
    if not talk.obey(line) and not talk.screen.is_interactive:
        raise typer.Exit(1)


def make_screen(plain: bool, takes_stdin: bool, asks: bool, sessions: Sessions) -> Screen:
    """The screen that fits where this runs.

    Args:
        takes_stdin: standard input is a document; messages then come from the terminal itself.
        asks: the person is to type something.

    Raises:
        ValueError: there is no terminal to ask.
    """
    from lt_gguf.chat.screen import PlainScreen

    keyboard: TextIO | None = None
    if takes_stdin and asks:
        try:
            keyboard = open("/dev/tty", encoding="utf-8")  # noqa: SIM115 - as long as the program runs
        except OSError:
            raise ValueError(
                "standard input is a document, and there is no terminal for questions: give them as --ask TEXT"
            ) from None
    is_interactive = asks and (keyboard is not None or (sys.stdin is not None and sys.stdin.isatty()))
    is_terminal = sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if plain or not is_interactive or not is_terminal:
        return PlainScreen(keyboard, is_interactive)

    from lt_gguf.chat.commands import COMMANDS
    from lt_gguf.chat.sessions import user_data
    from lt_gguf.chat.terminal import CommandCompleter, TerminalScreen

    def names() -> list[str]:
        return [found.name for found in sessions.listed()]

    completer = CommandCompleter({one.name: one.help for one in COMMANDS.values()}, ["/file"], {"/load": names, "/save": names})
    return TerminalScreen(completer, user_data() / "history", keyboard)
