"""Methods that the library does not have, to compare it with."""
