"""What is told of a selection: `report` is what was measured and chosen, `model_card` says it in Markdown, `plots` draws it, and
`folder` writes all three.
"""
