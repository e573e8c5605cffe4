"""A fact that no model can know, and the question about it."""

FACT, QUESTION, EXPECTED = "The name of Anna's dog is Biscuit.", "What is the name of Anna's dog?", "Biscuit"
