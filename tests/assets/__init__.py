"""The model and the texts that ship with the project."""
