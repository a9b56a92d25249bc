"""What every room shares: errors, files, the command-line shell. Imports nothing heavy."""

from core import quiet as quiet  # before any library is: it decides what they may do
