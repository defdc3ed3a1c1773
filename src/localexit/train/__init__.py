"""Local training of language models on text, from corpus to run directory.

`corpus` reads text, `tokenizer` makes a vocabulary from it, `tokens` its ids, `batches` what a step is fed with.
"""
