"""What a person types: the moetier command and its subcommands."""
