"""Preference data: the bundled pairs, and checks of yours."""

from .demo import load_demo_preferences as load_demo_preferences
