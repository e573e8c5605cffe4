"""llama-server for programs and for people: `llama_server` starts and watches it, `gateway` is what others reach, with documents and
the page, `page` the page's files. `beginnings` keeps what prompts begin with, so that a document is read once.
"""
