"""Bundled preference pairs, instructions, questions, constraints and documents, and checks of yours."""

from .demo import load_demo_constraints as load_demo_constraints
from .demo import load_demo_corpus as load_demo_corpus
from .demo import load_demo_instructions as load_demo_instructions
from .demo import load_demo_preferences as load_demo_preferences
from .demo import load_demo_questions as load_demo_questions
