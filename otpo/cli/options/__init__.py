"""Options of the commands: the command line, recipes, what is refused before a run, what is never written."""
