"""Models as the commands load them, and what training through TRL needs of Compass."""
