"""Subcommands of `ls-vision`, a module each: their arguments, and what they print."""
