"""Instructions with constraints that a program can check: how many, in which form, in which language, with which words."""
