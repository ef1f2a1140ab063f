"""Instructions with constraints that a program can check: how many, in which form and language, with which words."""
