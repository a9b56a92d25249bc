"""What every room shares: errors, files, the command-line shell. Imports nothing heavy."""
