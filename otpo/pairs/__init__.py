"""Preference pairs of a model's own answers: prompts are answered several times, judged, and the best meets the worst.

`otpo pairs` is the command. Here are its parts: sampling, judging, choosing a pair, and the ledger that a run which
was killed goes on from.
"""
