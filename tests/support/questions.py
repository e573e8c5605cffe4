"""A fact that no model can know, and the question about it."""

FACT, QUESTION, EXPECTED = "The name of Anna's dog is Biscuit.", "What is the name of Anna's dog?", "Biscuit"
# A half of SmolLM2's layers that loses as much as its report's on the questions of that, and not this name, which that one forgets:
# models/smollm2/README.md.
KEEPS_NAMES = "0-2,10-16,19,25-27,29"
