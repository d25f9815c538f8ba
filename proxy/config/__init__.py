"""What an operator decides: the keys, their values, the file, and what is told where something is wrong."""
