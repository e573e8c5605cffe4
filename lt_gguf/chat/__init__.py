"""Talking with a model about documents: one conversation object without a terminal, and the screen apart from it.

`conversation.py` is what a program uses: documents, questions, second thoughts; `opening.py` begins one in a call.
`prompt.py` makes tokens of it, `sessions.py` keeps it as a file. `commands.py` is what a person types, `screen.py` how it looks in
a pipe, `terminal.py` how it looks in a terminal.
"""
