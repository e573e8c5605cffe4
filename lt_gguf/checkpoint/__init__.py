"""A Hugging Face checkpoint: where it comes from, what its folder must have, which ones can be analysed, its weights.

`checks` and `weights` need torch; the others don't.
"""
