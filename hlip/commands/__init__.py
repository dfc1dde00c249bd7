"""The commands of `hlip`, a module for each or for a few. Each has `add(commands)`, which adds its subparsers."""
