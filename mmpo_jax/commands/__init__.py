"""The subcommands of `mmpo`, one a file."""
